"""A recurrent language model: P[w_1 … w_N] = Π P[w_n | w_1 … w_{n-1}], with the past in the hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.errors import ShapeError
from fastseq.models.cross_entropy import linear_cross_entropy
from fastseq.models.layers import make_recurrent
from fastseq.models.sampling import check_sampling, sample


class LanguageModel(nn.Module):
    """Embedding, deep recurrent layers, and y_t = softmax(V h_t), for characters or words.

    Dropout stands at the embedding, between the layers and before the output, never on the recurrence (Zaremba et al.
    2014, section 3.1).

    Args:
        vocab_size: |V|, how many tokens there are.
        embedding_dim: width of a token's vector.
        hidden_size: H.
        num_layers: recurrent layers stacked upon one another.
        cell: ``"lstm"``, or ``"tanh"``, ``"relu"``, ``"sigmoid"`` for an Elman network.
        dropout: probability of zeroing, in training.
        tie_weights: whether the output's V is the embedding (Press & Wolf 2017); ``embedding_dim`` is then H.
        device: where the parameters are made.
        dtype: their floating point type; ``torch.bfloat16`` works, and so does ``torch.autocast`` over float32.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        dropout: float = 0.0,
        tie_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if tie_weights and embedding_dim != hidden_size:
            raise ValueError(
                f"tie_weights: expected embedding_dim = hidden_size, got {embedding_dim} and {hidden_size}"
            )
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "cell": cell,
            "dropout": dropout,
            "tie_weights": tie_weights,
        }
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, embedding_dim, **made)
        self.recurrent = make_recurrent(cell, embedding_dim, hidden_size, num_layers, dropout=dropout, **made)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocab_size, **made))
        if tie_weights:
            self.register_parameter("weight", None)
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # as Zaremba et al.: logits of N(0, 1) would be wild
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, **made))
            nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)

    @property
    def output_weight(self) -> Tensor:
        """V, [vocab_size, H]."""
        return self.embedding.weight if self.weight is None else self.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits of the next token at every step.

        Args:
            tokens: int64 [T, B].
            state: as the recurrent layers take it; zeros if None.

        Returns:
            [T, B, V], and the state after the last step, which continues the stream.
        """
        hidden, state = self.hidden(tokens, state)
        return nn.functional.linear(hidden, self.output_weight, self.bias), state

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What the output reads, [T, B, H], and the state; arguments as of :meth:`forward`."""
        _check_tokens("tokens", tokens, 1)
        output, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.dropout(output), state

    def loss(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        targets: Tensor | None = None,
        reduction: str = "mean",
        return_state: bool = False,
    ) -> Any:
        """Cross entropy of each next token, in nats, without ever holding T·B·|V| logits.

        For truncated backpropagation through time over a stream, call it window by window; each window begins with the
        last token of the one before::

            value, state = model.loss(window, detach_state(state), return_state=True)

        Args:
            tokens: int64 [T + 1, B]: all but the last are read, all but the first are predicted.
            state: the state before the first.
            targets: int64 [T, B]; all of ``tokens`` [T, B] are then read. -100 counts for nothing.
            reduction: ``"mean"`` or ``"sum"`` (over steps and batch).
            return_state: whether the state after the last token read is returned too.

        Returns:
            The scalar, or the scalar and the state.

        Raises:
            fastseq.ShapeError, TypeError: tokens or targets are not what they should be.
        """
        if targets is None:
            _check_tokens("tokens", tokens, 2)
            tokens, targets = tokens[:-1], tokens[1:]
        elif targets.shape != tokens.shape:
            raise ShapeError(f"targets: expected the shape of tokens {list(tokens.shape)}, got {list(targets.shape)}")
        hidden, state = self.hidden(tokens, state)
        value = linear_cross_entropy(
            hidden.flatten(0, 1), self.output_weight, targets.flatten(), self.bias, reduction=reduction
        )
        return (value, state) if return_state else value

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continues ``prompt``, one streaming step for each token drawn. Dropout is off meanwhile.

        Args:
            prompt: int64 [P], or [P, B] for several streams; P at least 1.
            length: how many tokens to draw.
            temperature, top_k, top_p: as of :func:`fastseq.models.sample`.
            seed: makes the draws repeatable, whatever else draws; torch's own generator if None.

        Returns:
            The new tokens, int64 [length] or [length, B].

        Raises:
            fastseq.ShapeError, TypeError: ``prompt`` is not what it should be.
            ValueError: another argument is out of range.
        """
        if length < 0:
            raise ValueError(f"length: expected a whole number of at least 0, got {length!r}")
        check_sampling(temperature, top_k, top_p)
        batched = prompt.dim() == 2
        prompt = prompt if batched else prompt.unsqueeze(1)
        _check_tokens("prompt", prompt, 1)
        generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
        training = self.training
        self.eval()
        try:
            output, state = self.hidden(prompt)
            h, drawn = output[-1], []
            for index in range(length):
                logits = nn.functional.linear(h, self.output_weight, self.bias)
                token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
                drawn.append(token)
                if index < length - 1:
                    h, state = self._step(self.embedding(token), state)
        finally:
            self.train(training)
        tokens = torch.stack(drawn) if drawn else prompt.new_empty(0, prompt.size(1))
        return tokens if batched else tokens.squeeze(1)

    def _step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not hasattr(self.recurrent, "step"):  # fastseq.to_torch has been here
            output, state = self.recurrent(x.unsqueeze(0), state)
            return output[0], state
        stepped: tuple[Tensor, Any] = self.recurrent.step(x, state)
        return stepped


def _check_tokens(name: str, tokens: Tensor, least: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected a Tensor of integers, got {kind}")
    if tokens.dim() != 2 or tokens.size(0) < least:
        raise ShapeError(f"{name}: expected shape [T, B] with T at least {least}, got {list(tokens.shape)}")
