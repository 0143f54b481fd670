"""Deep embedded clustering (Xie, Girshick & Farhadi 2016) and its improved form (IDEC, Guo et al. 2017)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fastseq import autoencoder as kinds
from fastseq import checkpoint as files
from fastseq import functional as F
from fastseq._seeds import generator
from fastseq.autoencoder.base import Autoencoder
from fastseq.autoencoder.denoising import check_corruption
from fastseq.autoencoder.points import Points
from fastseq.autoencoder.ranks import Ranks
from fastseq.autoencoder.training import OPTIMIZERS, PRECISIONS, Plan, train
from fastseq.cluster.inputs import checked, like, seed_of
from fastseq.cluster.joint import Joint, Settings
from fastseq.cluster.lloyd import kmeans

TARGETS = ("stored", "streamed")
_PRETRAIN = 5  # a place of random numbers; joint.py has 3 and 4
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# What does not change the steps that are taken, so that a checkpoint may go on with other values.
_FREE = ("autoencoder", "checkpoint", "checkpoint_interval", "device", "max_iter", "progress", "random_state")
State = dict[str, Any]


class DEC(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters points by learning codes for them that form clusters.

    An autoencoder is pretrained; k-means of its codes gives the centres; then encoder and centres are trained together
    so that the soft assignment Q comes nearer to a sharper target P made of itself. Labels are not used anywhere.

    ``X`` may be an array, a memory-mapped array, a tensor, or a ``torch.utils.data.Dataset`` of rows larger than
    memory: a batch at a time is read, and what is kept of all points are their codes. Under ``torchrun`` the processes
    share each batch and take the same steps as one would.

    Args:
        n_clusters: K.
        autoencoder: one that has been trained, of which a copy is taken; None: a denoising autoencoder is pretrained.
        hidden_sizes: widths of its encoder.
        code_size: numbers in a code; None: as many as clusters.
        corruption: of the input in pretraining, ``"masking"`` or ``"gaussian"``.
        noise: the share that is masked, or the standard deviation of the Gaussian noise in the units of the data.
        pretrain_epochs: passes over the data.
        pretrain_batch_size: points in a step of pretraining.
        n_pretrain: autoencoders that are pretrained, each from a start of its own. The one is taken whose k-means
            agrees most with those of the others (the largest sum of adjusted Rand indices; no labels).
        pretrain_optimizer: ``"adam"`` or ``"sgd"``.
        pretrain_learning_rate: it is divided by 10 for the last quarter of the epochs.
        n_init: restarts of k-means.
        alpha: degrees of freedom of the Student's t kernel.
        optimizer: of the joint training, ``"sgd"`` or ``"adam"``.
        learning_rate: of the joint training.
        momentum: of SGD; it is kept across refreshes.
        batch_size: points in a step of the joint training, over all processes.
        update_interval: steps between two refreshes of P from the whole data.
        tol: stop when fewer than this share of the points change cluster from one refresh to the next.
        max_iter: steps of the joint training, at most.
        target: ``"stored"``: P is kept, N·K numbers, as in the paper; ``"streamed"``: only the frequencies are, and P
            is made anew from each batch's Q, so that nothing of size N·K is held.
        reconstruction_weight: 0 for DEC; above 0, the weight of the reconstruction loss beside the clustering loss,
            which makes it IDEC (its gamma of 0.1 on the clustering loss is a weight of 10 here).
        clustering_noise: the level of ``corruption`` in the joint training: corrupted points are pulled to the target
            P of the points themselves, which moves the borders of clusters to where few points are (Guo et al. 2018,
            "Deep embedded clustering with data augmentation"). 0, as in the paper of 2016: none.
        train_encoder: False trains the centres only (the paper's "DEC w/o backprop").
        precision: ``"bfloat16"`` computes the large layers in bfloat16; the code and all parameters stay in float32.
        dtype: ``"float32"`` or ``"float64"``, of the parameters.
        device: of the training; None: that of a tensor, else the CPU.
        checkpoint: a file for the state of the fit, kept every ``checkpoint_interval`` seconds, when Ctrl-C is pressed,
            and at the end. A fit that finds it goes on from it and ends with the same bits as one that never stopped.
        checkpoint_interval: seconds.
        random_state: a seed, a ``numpy.random.RandomState``, or None.
        progress: show bars.

    Attributes:
        labels_: ``[N]``.
        cluster_centers_: ``[K, m]``, in the space of the codes.
        autoencoder_: the trained autoencoder.
        history_: a dict: ``"pretraining"``, one entry per epoch, and ``"clustering"``, one entry per refresh, with the
            step, the loss KL(P||Q) / N and the share of points that changed cluster.
        n_iter_: steps of the joint training.
        converged_: whether ``tol`` ended it.
        n_features_in_: d.
    """

    def __init__(
        self,
        n_clusters: int = 10,
        *,
        autoencoder: Autoencoder | None = None,
        hidden_sizes: Sequence[int] = (500, 500, 2000),
        code_size: int | None = None,
        corruption: str = "masking",
        noise: float = 0.2,
        pretrain_epochs: int = 100,
        pretrain_batch_size: int = 256,
        n_pretrain: int = 1,
        pretrain_optimizer: str = "adam",
        pretrain_learning_rate: float = 1e-3,
        n_init: int = 20,
        alpha: float = 1.0,
        optimizer: str = "sgd",
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        batch_size: int = 256,
        update_interval: int = 160,
        tol: float = 1e-3,
        max_iter: int = 20_000,
        target: str = "stored",
        reconstruction_weight: float = 0.0,
        clustering_noise: float = 0.0,
        train_encoder: bool = True,
        precision: str = "float32",
        dtype: str = "float32",
        device: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_interval: float = 30.0,
        random_state: Any = None,
        progress: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.autoencoder = autoencoder
        self.hidden_sizes = hidden_sizes
        self.code_size = code_size
        self.corruption = corruption
        self.noise = noise
        self.pretrain_epochs = pretrain_epochs
        self.pretrain_batch_size = pretrain_batch_size
        self.n_pretrain = n_pretrain
        self.pretrain_optimizer = pretrain_optimizer
        self.pretrain_learning_rate = pretrain_learning_rate
        self.n_init = n_init
        self.alpha = alpha
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.update_interval = update_interval
        self.tol = tol
        self.max_iter = max_iter
        self.target = target
        self.reconstruction_weight = reconstruction_weight
        self.clustering_noise = clustering_noise
        self.train_encoder = train_encoder
        self.precision = precision
        self.dtype = dtype
        self.device = device
        self.checkpoint = checkpoint
        self.checkpoint_interval = checkpoint_interval
        self.random_state = random_state
        self.progress = progress

    # Training.

    def fit(self, X: Any, y: Any = None) -> Self:
        """Finds the clusters of ``X [N, d]``. ``y`` is ignored.

        Raises:
            ValueError: an argument out of range, fewer points than clusters, numbers that are not finite, a loss that
                is not finite any more, or a checkpoint of another fit.
            KeyboardInterrupt: after Ctrl-C, when the checkpoint has been written.
        """
        X = checked(self, X, reset=True, datasets=True)
        self._check_arguments()
        points = self._points(X)
        self.n_features_in_ = points.features
        if len(points) < self.n_clusters:
            raise ValueError(f"n_clusters: expected at most n_samples={len(points)}, got {self.n_clusters}")
        state = self._load_checkpoint(points)
        if state is None:
            if Ranks.found().count > 1 and not isinstance(self.random_state, int):
                raise ValueError(f"random_state: expected an int with several processes, got {self.random_state!r}")
            seed = seed_of(self.random_state)
            model = self._make_autoencoder(points, seed)
            history: State = {"pretraining": [], "clustering": []}
        else:
            seed, history = state["seed"], state["history"]
            model = autoencoder_of(state["autoencoder"]).to(points.device, points.dtype)
        header = self._header(points, seed, model)

        stage = "pretraining" if state is None else state["stage"]
        inner = None if state is None else state["inner"]
        if stage == "pretraining" and self.autoencoder is None:
            history["pretraining"] = self._pretrain(model, points, seed, header, state)
        if stage == "pretraining":
            inner = None
        joint = self._joint(model, points, seed, inner)
        if stage != "done":

            def save(inner: State, stage: str = "clustering") -> None:
                files.save(Path(self.checkpoint), {**header, "stage": stage, "history": history, "inner": inner})  # type: ignore[arg-type]

            joint.run(None if self.checkpoint is None else save, self.checkpoint_interval, self.progress)
        history["clustering"] = joint.history
        self.autoencoder_ = model.eval()
        self.cluster_centers_ = like(joint.centers, X)
        self.history_ = history
        self.n_iter_ = joint.step_number
        self.converged_ = joint.converged if stage != "done" else bool(inner["converged"])  # type: ignore[index]
        self.labels_ = self.predict(X)
        if stage != "done" and self.checkpoint is not None and joint.ranks.first:
            # Not those of the last refresh: in another precision a point on a border may fall to the other side.
            predicted = torch.as_tensor(self.labels_).cpu()
            save(joint.state() | {"converged": self.converged_, "predicted": predicted}, "done")
        return self

    def _check_arguments(self) -> None:
        for name in ("n_clusters", "n_init", "n_pretrain", "batch_size", "pretrain_batch_size", "update_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_iter", "tol", "pretrain_epochs", "momentum", "reconstruction_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("alpha", "learning_rate", "pretrain_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        choices = {
            "optimizer": OPTIMIZERS,
            "pretrain_optimizer": OPTIMIZERS,
            "target": TARGETS,
            "precision": PRECISIONS,
            "dtype": tuple(DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_corruption(self.corruption, self.noise, "noise")
        check_corruption(self.corruption, self.clustering_noise, "clustering_noise")
        if self.autoencoder is not None and not isinstance(self.autoencoder, Autoencoder):
            raise TypeError(f"autoencoder: expected an Autoencoder or None, got {type(self.autoencoder).__name__}")

    def _points(self, X: Any) -> Points:
        device = self.device if self.device is not None else X.device if isinstance(X, Tensor) else "cpu"
        return Points(X, DTYPES[self.dtype], device, name="X")

    def _make_autoencoder(self, points: Points, seed: int) -> Autoencoder:
        if self.autoencoder is not None:
            if self.autoencoder.input_size != points.features:
                raise ValueError(
                    f"autoencoder: expected input_size {points.features}, that of X, got {self.autoencoder.input_size}"
                )
            return copy.deepcopy(self.autoencoder).to(points.device, points.dtype)
        with torch.random.fork_rng(devices=[]):  # the caller's generator is left alone
            torch.manual_seed(seed)
            code_size = self.n_clusters if self.code_size is None else self.code_size
            model = kinds.DenoisingAutoencoder(
                points.features, tuple(self.hidden_sizes), code_size, corruption=self.corruption, level=self.noise
            )
        return model.to(points.device, points.dtype)

    def _pretrain(
        self, model: Autoencoder, points: Points, seed: int, header: State, state: State | None
    ) -> list[dict[str, float]]:
        """Gives ``model`` the parameters of the autoencoder that is taken, and returns the history of that one."""
        done: list[State] = [] if state is None else state.get("done", [])  # whole pretrainings
        inner = None if state is None else state["inner"]
        for run in range(len(done), self.n_pretrain):
            plan = Plan(
                epochs=self.pretrain_epochs,
                batch_size=self.pretrain_batch_size,
                optimizer=self.pretrain_optimizer,
                learning_rate=self.pretrain_learning_rate,
                decay_epochs=max(1, -(-3 * self.pretrain_epochs // 4)),
                seed=seed if run == 0 else generator(seed, _PRETRAIN, run).initial_seed(),
                precision=self.precision,
            )

            def save(inner: State) -> None:
                history = {"pretraining": [], "clustering": []}  # type: ignore[var-annotated]
                parts = {"stage": "pretraining", "history": history, "done": done, "inner": inner}
                files.save(Path(self.checkpoint), {**header, **parts})  # type: ignore[arg-type]

            candidate = self._make_autoencoder(points, plan.seed)
            history = train(
                candidate.terms,
                (candidate,),
                points,
                plan,
                save=None if self.checkpoint is None else save,
                interval=self.checkpoint_interval,
                state=inner,
                progress=self.progress,
                label="pretraining" if self.n_pretrain == 1 else f"pretraining {run + 1} of {self.n_pretrain}",
            )
            done.append({"parameters": candidate.state_dict(), "history": history})
            inner = None
        taken = done[self._most_agreed(model, [one["parameters"] for one in done], points, seed)]
        model.load_state_dict(taken["parameters"])
        pretraining: list[dict[str, float]] = taken["history"]
        return pretraining

    def _most_agreed(self, model: Autoencoder, candidates: list[State], points: Points, seed: int) -> int:
        """Which parameters of ``model`` give the k-means that is most like those of the others."""
        if len(candidates) == 1:
            return 0
        partitions = []
        for parameters in candidates:
            model.load_state_dict(parameters)
            joint = self._joint(model, points, seed, None)
            z = joint.ranks.gather(joint.encode(), len(points))
            partitions.append(F.nearest_center(z, joint.centers)[0].cpu().numpy())
        return int(np.argmax([sum(adjusted_rand_score(one, other) for other in partitions) for one in partitions]))

    def _joint(self, model: Autoencoder, points: Points, seed: int, inner: State | None) -> Joint:
        names = Settings.__dataclass_fields__
        settings = Settings(**{name: getattr(self, name) for name in names if name != "seed"}, seed=seed)
        zeros = torch.zeros(self.n_clusters, model.code_size, dtype=points.dtype, device=points.device)
        joint = Joint(model, zeros, points, settings)
        if inner is not None:
            joint.restore(inner)
        else:
            z = joint.ranks.gather(joint.encode(), len(points))
            found = kmeans(z, self.n_clusters, n_init=self.n_init, seed=seed)
            with torch.no_grad():
                joint.loss.centers.copy_(found.centers)
        return joint

    # Checkpoints.

    def _header(self, points: Points, seed: int, model: Autoencoder) -> State:
        parameters = {name: value for name, value in self.get_params(deep=False).items() if name not in _FREE}
        parameters["hidden_sizes"] = list(self.hidden_sizes)
        return {
            "kind": "DEC",
            "parameters": parameters,
            "data": points.fingerprint(),
            "seed": seed,
            "autoencoder": {"kind": type(model).__name__, "arguments": model.arguments()},
            "features": points.features,
        }

    def _load_checkpoint(self, points: Points) -> State | None:
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return None
        state = files.load(self.checkpoint)
        if state.get("kind") != "DEC":
            raise ValueError(f"{self.checkpoint}: expected a checkpoint of DEC, got one of {state.get('kind')}")
        if state["data"] != points.fingerprint():
            raise ValueError(f"{self.checkpoint}: it is of a fit to other data")
        if isinstance(self.random_state, int) and self.random_state != state["seed"]:
            raise ValueError(f"random_state: expected {state['seed']}, as in the checkpoint, got {self.random_state}")
        mine = self.get_params(deep=False) | {"hidden_sizes": list(self.hidden_sizes)}
        for name, value in state["parameters"].items():
            if mine[name] != value:
                raise ValueError(f"{name}: expected {value!r}, as in {self.checkpoint}, got {mine[name]!r}")
        return state

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The fitted estimator whose fit left its last checkpoint at ``path``; ``labels_`` are arrays.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is none of DEC, or of a fit that has not ended.
        """
        state = files.load(path)
        if state.get("kind") != "DEC" or state["stage"] != "done":
            raise ValueError(f"{path}: expected the checkpoint of a finished fit of DEC")
        made = cls(**state["parameters"] | {"hidden_sizes": tuple(state["parameters"]["hidden_sizes"])})
        inner = state["inner"]
        made.autoencoder_ = autoencoder_of(state["autoencoder"]).to(DTYPES[made.dtype])
        made.autoencoder_.load_state_dict(inner["parameters"])
        made.autoencoder_.eval()
        made.cluster_centers_ = inner["centers"].numpy()
        made.labels_ = inner["predicted"].numpy()
        made.history_ = state["history"] | {"clustering": inner["history"]}
        made.n_iter_, made.converged_ = inner["step"], inner["converged"]
        made.n_features_in_ = state["features"]
        return made

    # What it has learned.

    def transform(self, X: Any) -> Any:
        """The codes of points: ``[N, m]``."""
        X = self._fitted(X)
        return like(self._encode(X), X)

    def soft_assign(self, X: Any) -> Any:
        """``q [N, K]``, DEC's own soft assignment of points to clusters."""
        X = self._fitted(X)
        z = self._encode(X)
        return like(F.student_t_assignment(z, self._centers(z), self.alpha), X)

    predict_proba = soft_assign

    def predict(self, X: Any) -> Any:
        """The cluster of the largest ``q``, which is that of the nearest centre: ``[N]``."""
        X = self._fitted(X)
        z = self._encode(X)
        return like(F.nearest_center(z, self._centers(z))[0], X)

    def score(self, X: Any, y: Any = None) -> float:
        """``-KL(P||Q) / N``, with P made of these points' own frequencies."""
        z = self._encode(self._fitted(X))
        centers = self._centers(z)
        freq = F.accumulate_frequencies([z], centers, alpha=self.alpha)
        return -F.clustering_loss(z, centers, freq=freq, alpha=self.alpha).item() / len(z)

    @property
    def _n_features_out(self) -> int:
        return self.autoencoder_.code_size

    def _fitted(self, X: Any) -> Any:
        check_is_fitted(self)
        return checked(self, X, reset=False, datasets=True)

    def _encode(self, X: Any) -> Tensor:
        model = self.autoencoder_
        if isinstance(X, np.ndarray) and X.dtype == np.float64:
            # Who asks in double precision gets it: results that do not hang on how the points are batched.
            model = copy.deepcopy(model).double()
        return model.encode(X)

    def _centers(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.cluster_centers_).to(z.device, z.dtype)


def autoencoder_of(described: State) -> Autoencoder:
    """The autoencoder of this kind and these arguments, untrained."""
    made: Autoencoder = getattr(kinds, described["kind"])(**described["arguments"])
    return made
