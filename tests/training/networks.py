"""Small torch networks of the kinds that people train from, each with a batch of its inputs, and ways to export them."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

TOKENS, VECTORS = torch.randint(0, 20, (5, 5)), torch.randn(5, 6)
GREY, IMAGES = torch.randn(5, 1, 8, 8), torch.randn(5, 3, 16, 16)


class Normalized(nn.Module):
    """Inputs are standardized by two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, -0.2, 0.1, 0.0, 0.3, 0.7]))
        self.register_buffer("std", torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5, 0.8]))
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a((x - self.mean) / self.std)


class BatchNormalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.f = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.flatten(torch.max_pool2d(torch.relu(self.n(self.c(x))), 2), 1))


class Causal(nn.Module):
    """Attention with a mask of infinities as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.triu(torch.full((5, 5), float("-inf")), 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        scores = self.q(h) @ self.k(h).transpose(1, 2) / 8**0.5 + self.mask
        return self.f((torch.softmax(scores, -1) @ self.v(h)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **arguments: Any) -> None:
        super().__init__()
        self.batch_first = arguments.get("batch_first", False)
        self.e, self.r = nn.Embedding(20, 8), kind(8, 8, **arguments)
        self.f = nn.Linear(16 if arguments.get("bidirectional") else 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x) if self.batch_first else self.e(x).transpose(0, 1)
        y = self.r(h)[0]
        return self.f(y[:, -1] if self.batch_first else y[-1])


class LastState(nn.Module):
    """What is used of a recurrent layer is its last state."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.e, self.r, self.f = nn.Embedding(20, 8), kind(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.r(self.e(x))[1]
        return self.f((state[0] if isinstance(state, tuple) else state)[-1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.t = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.t(self.e(x)).mean(1))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        changed = inputs != outputs
        self.d = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if changed
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.d(x))


class Residual(nn.Module):
    """A residual network as torchvision has them: every normalization starts with ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.p = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
        self.l = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.a, self.f = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.flatten(self.a(self.l(self.p(F.relu(self.b(self.c(x)))))), 1))


class Squeezed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.b(F.relu(self.a(F.adaptive_avg_pool2d(x, 1)))))


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            Squeezed(8), nn.Conv2d(8, 4, 1), nn.SiLU(),
        )  # fmt: skip
        self.f = nn.Sequential(nn.Linear(4, 8), nn.Hardswish(), nn.Dropout(0.0), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.n(x).mean([2, 3]))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b0, self.c0 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.b1, self.c1 = nn.BatchNorm2d(7), nn.Conv2d(7, 4, 3, padding=1)
        self.t, self.f = nn.AvgPool2d(2), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.cat([x, self.c0(F.relu(self.b0(x)))], 1)
        b = torch.cat([a, self.c1(F.relu(self.b1(a)))], 1)
        return self.f(F.adaptive_avg_pool2d(self.t(b), 1).flatten(1))


class Scaled(nn.Module):
    """A ConvNeXt block: its layer scale is a parameter that only scales."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.d = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.n, self.a, self.b = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 16), nn.Linear(16, 8)
        self.g, self.f = nn.Parameter(torch.full((8, 1, 1), 0.1)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.s(x)
        y = self.b(F.gelu(self.a(self.n(self.d(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.f((x + self.g * y).mean([2, 3]))


class Gpt2(nn.Module):
    """A GPT-2 block; the last layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.l1, self.qkv, self.o = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.l2, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.lf, self.h = nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        self.h.weight = self.e.weight
        self.register_buffer("bias", torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape
        h = self.e(x) + self.p(torch.arange(length, device=x.device))
        q, k, v = (t.view(rows, length, 2, 4).transpose(1, 2) for t in self.qkv(self.l1(h)).split(8, -1))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(4)
        scores = scores.masked_fill(~self.bias[:, :, :length, :length], torch.finfo(scores.dtype).min)
        h = h + self.o((F.softmax(scores, -1) @ v).transpose(1, 2).reshape(rows, length, 8))
        z = self.a(self.l2(h))
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return self.h(self.lf(h + self.b(z))).mean(1)


class Fused(nn.Module):
    """Attention by torch's fused function, with its causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.qkv, self.f = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape
        q, k, v = (t.view(rows, length, 2, 4).transpose(1, 2) for t in self.qkv(self.e(x)).split(8, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.f(y.transpose(1, 2).reshape(rows, length, 8).mean(1))


class Bert(nn.Module):
    """A BERT block, with padding masked by the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.p, self.t, self.n = nn.Embedding(20, 8), nn.Embedding(16, 8), nn.Embedding(2, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.n1, self.i, self.u, self.n2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.pool, self.f, self.drop = nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.0)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)))

    def forward(self, x: Tensor) -> Tensor:
        mask = (1.0 - (x != 0).to(torch.float32)[:, None, None, :]) * torch.finfo(torch.float32).min
        places = self.position_ids[:, : x.shape[1]]
        h = self.drop(self.n(self.w(x) + self.t(torch.zeros_like(x)) + self.p(places)))
        q, k, v = (f(h).view(*h.shape[:2], 2, 4).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        attention = self.drop(torch.softmax(q @ k.transpose(-1, -2) / 2.0 + mask, -1))
        y = (attention @ v).permute(0, 2, 1, 3).contiguous()
        h = self.n1(self.o(y.view(*y.shape[:2], 8)) + h)
        h = self.n2(self.u(F.gelu(self.i(h))) + h)
        return self.f(torch.tanh(self.pool(h[:, 0])))


class Grouped(nn.Module):
    """Group and instance normalization, a transposed convolution, and resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.g, self.i = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.u, self.f = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Without an activation behind it, what is normalized by sample has a mean that depends on nothing before.
        y = self.u(F.silu(self.i(F.silu(self.g(self.c(x))))))
        return self.f(F.interpolate(y, scale_factor=2.0, mode="nearest").mean([2, 3]))


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.f = nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = F.elu(h) + F.selu(h) + F.celu(h) + F.mish(h) + F.softplus(h) + self.p(h) + F.logsigmoid(h)
        h = h + F.leaky_relu(h) + F.glu(torch.cat([h, h], -1)) + F.gelu(h, approximate="tanh") + F.hardtanh(h)
        return self.f(F.normalize(h + F.softsign(h) + F.tanhshrink(h), dim=-1))


class Copied(nn.Module):
    """Layers made as copies of one another, so that their weights are equal at first, and one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(6, 6)
        self.layers, self.shared = nn.ModuleList([first, copy.deepcopy(first)]), nn.Linear(6, 6)
        self.norm, self.g, self.f = (
            nn.LayerNorm(6, elementwise_affine=False),
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]
        for layer in self.layers:
            h = torch.relu(layer(h))
        h = self.shared(torch.tanh(self.shared(h)))
        h = self.norm(torch.tanh(self.norm(h) * self.g)) * self.g
        return self.f(h[:, 0])


class Encoders(nn.Module):
    """torch's own encoder: its layers are copies, their biases zeros."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.e, self.t = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.f = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.t(self.e(x)).mean(1))


class Llama(nn.Module):
    """A block of Llama: normalization by the root mean square (one scale for both), rotated positions, gated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.g, self.f = nn.Embedding(20, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 4)
        self.q, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.k, self.v = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.register_buffer("inverse", 1 / (10000 ** (torch.arange(0, 4, 2) / 4)))

    def normalize(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape
        h = self.e(x)
        z = self.normalize(h)
        angles = torch.arange(length).float()[:, None] * self.inverse
        cos, sin = (part(torch.cat((angles, angles), -1)) for part in (torch.cos, torch.sin))
        q = self.q(z).view(rows, length, 2, 4).transpose(1, 2)
        k, v = (f(z).view(rows, length, 1, 4).transpose(1, 2).repeat_interleave(2, 1) for f in (self.k, self.v))
        q, k = (t * cos + torch.cat((-t[..., 2:], t[..., :2]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, 8)
        h = h + self.o(y)
        z = self.normalize(h)
        return self.f((h + self.down(F.silu(self.gate(z)) * self.up(z))).mean(1))


class Translator(nn.Module):
    """torch's encoder and decoder: attention whose one matrix is cut into three."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.t = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        return self.f(self.t(h, h).mean(1))


class Segmenter(nn.Module):
    """Down and up again, resized by factors and to sizes, with channels made into pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.u = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 4, 2, 2),
        )
        self.c, self.f = nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = self.u(F.relu(self.b(F.max_pool2d(a, 2))))
        y = F.pixel_shuffle(F.silu(self.c(torch.cat([a, b], 1))), 2)
        y = F.interpolate(torch.tanh(y), scale_factor=2, mode="bilinear", align_corners=False)
        y = F.interpolate(F.silu(y), size=(20, 20), mode="bilinear", align_corners=True)
        return self.f(F.interpolate(torch.tanh(y), size=(9, 11), mode="nearest").mean([2, 3]))


#: How each network is made, and a batch of its inputs.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "norm": (Normalized, VECTORS), "bn": (BatchNormalized, GREY), "causal": (Causal, TOKENS), "encoder": (Encoder, TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), TOKENS),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), TOKENS),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), TOKENS),
    "bidirectional lstm": (lambda: Recurrent(nn.LSTM, batch_first=True, bidirectional=True), TOKENS),
    "two layers of gru": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), TOKENS),
    "lstm without bias": (lambda: Recurrent(nn.LSTM, num_layers=2, bias=False), TOKENS),
    "last state of lstm": (lambda: LastState(nn.LSTM), TOKENS), "last state of gru": (lambda: LastState(nn.GRU), TOKENS),
    "resnet": (Residual, IMAGES), "mobilenet": (Mobile, IMAGES), "densenet": (Dense, IMAGES), "convnext": (Scaled, IMAGES),
    "gpt2": (Gpt2, TOKENS), "fused attention": (Fused, TOKENS), "bert": (Bert, TOKENS), "groups": (Grouped, IMAGES),
    "activations": (Activations, VECTORS), "copies": (Copied, VECTORS), "encoders": (Encoders, TOKENS),
    "llama": (Llama, TOKENS), "translator": (Translator, TOKENS), "segmenter": (Segmenter, IMAGES),
}  # fmt: skip

_TRACED: dict[str, dict[str, Any]] = {
    "eval": {"training": torch.onnx.TrainingMode.EVAL},
    "training": {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False},
    "preserve": {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False},
}
#: torch's tracing exporter in three modes, and its newer one with and without its optimizer.
WAYS = (*_TRACED, "dynamo", "dynamo unoptimized")


def make(name: str) -> nn.Module:
    """The network with the same weights each time."""
    torch.manual_seed(3)
    return NETWORKS[name][0]()


def export(name: str, way: str, path: Path) -> Path:
    """Writes the network to `path`, its batch axis open; input `x`, output `y`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if way in _TRACED:
            x, network = NETWORKS[name][1], make(name).train(way != "eval")
            axes = {"x": {0: "b"}, "y": {0: "b"}}
            torch.onnx.export(
                network, (x,), str(path), input_names=["x"], output_names=["y"], dynamic_axes=axes, opset_version=17,
                dynamo=False, **_TRACED[way],
            )  # fmt: skip
        else:
            # The mode makes no difference to a network without batch normalization, and an export takes seconds.
            modes = any(isinstance(module, nn.BatchNorm2d) for module in make(name).modules())
            plain, optimized = _captured(name, training=modes and way == "dynamo unoptimized")
            path.write_bytes(optimized if way == "dynamo" else plain)
    return path


@cache
def _captured(name: str, *, training: bool) -> tuple[bytes, bytes]:
    """The network by torch's newer exporter, without and with its optimizer."""
    program = torch.onnx.export(
        make(name).train(training), (NETWORKS[name][1],), input_names=["x"], output_names=["y"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("b")},), verbose=False, optimize=False,
    )  # fmt: skip
    assert program is not None
    plain = program.model_proto.SerializeToString()
    program.optimize()
    return plain, program.model_proto.SerializeToString()


def draw(name: str, generator: torch.Generator) -> Tensor:
    """Another batch for the network."""
    x = NETWORKS[name][1]
    if x.dtype == torch.int64:
        return torch.randint(0, 20, x.shape, generator=generator)
    return torch.randn(x.shape, generator=generator)
