"""SwiftKV in plain tensors: an oracle with nothing of transformers or ptrain in it.

One document at a time, every score and every logit whole. Weights are given by name, as a model of the families Llama,
Mistral, Qwen2 or Qwen3 saves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Heads [n, s, d] turned by their positions 0, 1, ...: number i with number i + d/2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / theta ** (torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Dense:
    """Hidden states and losses of teacher and student for one document.

    Args:
        weights: by name.
        config: the configuration of the student.
    """

    def __init__(self, weights: Weights, config: Any) -> None:
        self.weights, self.config = weights, config
        self.theta = config.rope_parameters["rope_theta"]
        self.head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """With its bias, if there is one."""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def heads(self, x: torch.Tensor, at: int, what: str, swift: bool, turn: bool = True) -> torch.Tensor:
        """Queries, keys or values of layer `at`, [heads, s, d]."""
        attention = f"model.layers.{at}.self_attn"
        y = self.linear(x, f"{attention}.{what}_proj{'_swiftkv' if swift else ''}")
        y = y.unflatten(-1, (-1, self.head))
        if f"{attention}.{what}_norm.weight" in self.weights:
            y = norm(y, self.weights[f"{attention}.{what}_norm.weight"], self.config.rms_norm_eps)
        y = y.transpose(0, 1)
        return rotated(y, self.theta) if turn else y

    def window(self, at: int) -> int | None:
        """How far layer `at` looks back."""
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds is None or kinds[at] == "sliding_attention"
        return getattr(self.config, "sliding_window", None) if sliding else None

    def layer(self, x: torch.Tensor, at: int, shared: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """One layer; with `shared`, those keys and values."""
        name, eps = f"model.layers.{at}", self.config.rms_norm_eps
        y = norm(x, self.weights[f"{name}.input_layernorm.weight"], eps)
        queries = self.heads(y, at, "q", shared is not None)
        if shared is None:
            shared = self.heads(y, at, "k", False), self.heads(y, at, "v", False, turn=False)
        repeat = queries.shape[0] // shared[0].shape[0]
        keys, values = (part.repeat_interleave(repeat, dim=0) for part in shared)
        scores = queries @ keys.transpose(1, 2) / self.head**0.5
        back = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
        seen = (back >= 0) & (back < (self.window(at) or len(x)))
        mixed = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ values
        x = x + self.linear(mixed.transpose(0, 1).flatten(1), f"{name}.self_attn.o_proj")
        y = norm(x, self.weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(self.linear(y, f"{name}.mlp.gate_proj"))
        return x + self.linear(gate * self.linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def states(self, ids: torch.Tensor, student: bool) -> list[torch.Tensor]:
        """What goes into each layer, and what comes out of the final norm, [s, h] each."""
        config = self.config
        found, x = [], self.weights["model.embed_tokens.weight"][ids]
        source = shared = None
        for at in range(config.num_hidden_layers):
            found.append(x)
            if student and at >= config.num_key_value_layers:
                if source is None:
                    source = norm(x, self.weights["model.norm_swiftkv.weight"], config.rms_norm_eps)
                if (at - config.num_key_value_layers) % config.key_value_group_size == 0:
                    shared = self.heads(source, at, "k", True), self.heads(source, at, "v", True, turn=False)
            x = self.layer(x, at, shared)
        return [*found, norm(x, self.weights["model.norm.weight"], config.rms_norm_eps)]

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """[s, v]."""
        return last @ self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"]).T

    def losses(
        self, ids: torch.Tensor, labels: torch.Tensor, temperature: float, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over positions: of the divergence where the next token is a label, and of the squared distance."""
        with torch.no_grad():
            teacher = self.states(ids, student=False)
        student = self.states(ids, student=True)
        total = torch.zeros((), dtype=student[-1].dtype)
        for at in range(len(ids) - 1):
            if labels[at + 1] != -100:
                p = torch.softmax(self.logits(teacher[-1][at : at + 1])[0] / temperature, dim=-1)
                q = torch.softmax(self.logits(student[-1][at : at + 1])[0] / temperature, dim=-1)
                total = total + temperature**2 * (p * (p / q).log()).sum()
        return total, ((student[layer] - teacher[layer]) ** 2).mean(-1).sum()
