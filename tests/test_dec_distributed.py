"""Two processes over gloo take the same steps as one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dec_cases import SMALL, points

from fastseq.autoencoder.ranks import leave
from fastseq.cluster import DEC

STEPS = {"dtype": "float64", "pretrain_epochs": 2, "max_iter": 20, "clustering_noise": 0.1, "n_pretrain": 2}


def options(target, weight):
    return SMALL | STEPS | {"target": target, "reconstruction_weight": weight}


def fit(target, weight):
    # 151 points: shares and last batches are uneven.
    return DEC(**options(target, float(weight))).fit(points(151, np.float64)[0])


def main(folder, target, weight):
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = fit(target, weight)
    state = {name: value.numpy() for name, value in model.autoencoder_.state_dict().items()}
    rank = distributed.get_rank()
    np.savez(Path(folder) / f"{rank}.npz", centers=model.cluster_centers_, labels=model.labels_, **state)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(model.history_))
    leave()


@pytest.mark.parametrize(("target", "weight"), [("stored", 0.0), pytest.param("streamed", 2.0, marks=pytest.mark.full)])
def test_two_processes_take_the_steps_of_one(tmp_path, target, weight):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, str(tmp_path), target, str(weight)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = fit(target, weight)
    state = {name: value.numpy() for name, value in alone.autoencoder_.state_dict().items()}
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for name in ranks[0].files:
        assert np.array_equal(ranks[0][name], ranks[1][name]), name
    assert alone.n_iter_ == 20
    for name, wanted in {"centers": alone.cluster_centers_, **state}.items():
        np.testing.assert_allclose(ranks[0][name], wanted, rtol=1e-9, atol=1e-11, err_msg=name)
    assert np.array_equal(ranks[0]["labels"], alone.labels_)
    history = json.loads((tmp_path / "0.json").read_text())
    for stage in ("pretraining", "clustering"):
        for got, wanted in zip(history[stage], alone.history_[stage], strict=True):
            assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12)


if __name__ == "__main__":
    main(*sys.argv[1:])
