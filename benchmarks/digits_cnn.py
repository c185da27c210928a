"""Train the small classifier whose features judge the demo's images.

    python -m bar_edge.benchmarks.digits_cnn path/to/pretokenized

reads real, pretokenized digits (ROOT/train/CLASS/*.npz), decodes them with the demo's own tokenizer, so that real and
drawn images went through the same decoder, trains a CNN on three quarters of them, and writes
export/demo_data/digits_cnn.onnx (image -> logits and features) and digits_real.npz (mean and covariance of the features
of all real images). It prints the accuracy on the quarter held out.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import typer
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bar_edge.benchmarks.measure import replacing
from bar_edge.calibration.frechet import CNN, REAL, run_cnn, statistics
from bar_edge.calibration.pretokenized import read_pretokenized
from bar_edge.export.checkpoint import load_checkpoint
from bar_edge.export.demo import data
from bar_edge.export.model import build_decoder
from bar_edge.runtime.sampling import to_uint8
from bar_edge.runtime.terminal import run_function

POOL = 4  # 128 pixels -> 32
FEATURES = 48
_EPOCHS, _BATCH = 150, 64


class DigitsCnn(nn.Module):
    """Sees RGB at a quarter of the size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.features = nn.Linear(64 * 16, FEATURES)
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`shrink`ed images [B, 3, 32, 32] -> logits [B, classes], features [B, 48]."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        features = F.relu(self.features(x.flatten(1)))
        return self.logits(features), features


def shrink(pixels: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H/4, W/4] in -0.5..0.5."""
    return F.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255 - 0.5, POOL)


def vary(x: torch.Tensor) -> torch.Tensor:
    """Colours say nothing of a digit's class: mix channels, invert, and shift by up to two pixels each way."""
    mixed = torch.einsum("bchw,bdc->bdhw", x, torch.randn(len(x), 3, 3) * 0.4 + torch.eye(3))
    mixed = mixed * torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, -1.0, 1.0) + torch.randn(len(x), 3, 1, 1) * 0.1
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    return mixed.roll((dx, dy), (2, 3))


def to_onnx(model: DigitsCnn) -> onnx.ModelProto:
    """The network as a self-contained ONNX graph."""
    nodes, initializers = [], []

    def op(kind: str, *inputs: str, name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    x = op("Cast", "pixels", name="float", to=TensorProto.FLOAT)
    x = op("Transpose", x, name="nchw", perm=[0, 3, 1, 2])
    x = op("Div", x, constant("white", np.float32(255)), name="scaled")
    x = op("Sub", x, constant("half", np.float32(0.5)), name="centred")
    x = op("AveragePool", x, name="pooled", kernel_shape=[POOL, POOL], strides=[POOL, POOL])
    for conv in ("conv1", "conv2", "conv3"):
        weights = (constant(f"{conv}.weight", state[f"{conv}.weight"]), constant(f"{conv}.bias", state[f"{conv}.bias"]))
        x = op("Conv", x, *weights, name=f"{conv}.out", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        x = op("Relu", x, name=f"{conv}.relu")
    x = op("Flatten", x, name="flat")
    for layer, activation in (("features", "Relu"), ("logits", "Identity")):
        weights = (
            constant(f"{layer}.weight", state[f"{layer}.weight"]),
            constant(f"{layer}.bias", state[f"{layer}.bias"]),
        )
        x = op("Gemm", x, *weights, name=f"{layer}.out", transB=1)
        x = op(activation, x, name=layer)
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", 128, 128, 3])]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", state["logits.bias"].shape[0]]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", FEATURES]),
    ]
    graph = helper.make_graph(nodes, "digits_cnn", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="bar-edge")


def main(
    root: Annotated[Path, typer.Argument(help="Pretokenized digits.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("export/demo_data"),
    images: Annotated[int, typer.Option(help="Images to use.")] = 1000,
) -> None:
    """Train, print the held-out accuracy, write the two files."""
    torch.manual_seed(0)
    with data() as folder:
        checkpoint = load_checkpoint(folder / "generator.bin", folder / "tokenizer.bin", folder / "config.yaml")
    real = read_pretokenized(root, checkpoint.spec, images=images, seed=0)
    decoder = build_decoder(checkpoint)
    with torch.inference_mode():
        parts = [to_uint8(decoder(torch.from_numpy(part)).numpy()) for part in np.array_split(real.bits, images // 40)]
    pixels, labels = torch.from_numpy(np.concatenate(parts)), torch.from_numpy(real.class_ids)
    train, held_out = torch.arange(images) % 4 != 0, torch.arange(images) % 4 == 0
    small = shrink(pixels)
    model = DigitsCnn(checkpoint.spec.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    chosen = torch.nonzero(train).flatten()
    for epoch in range(_EPOCHS):
        for batch in chosen[torch.randperm(len(chosen))].split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(vary(small[batch]))[0], labels[batch]).backward()
            optimizer.step()
        schedule.step()
        if epoch % 25 == 24:
            typer.echo(f"epoch {epoch + 1} of {_EPOCHS}")
    with replacing(output / CNN) as partial:
        onnx.save(to_onnx(model), partial)
    logits, features = run_cnn(output / CNN, pixels.numpy())
    accuracy = (logits.argmax(1) == labels.numpy())[held_out.numpy()].mean()
    mean, covariance = statistics(features)
    with replacing(output / REAL) as partial, partial.open("wb") as file:
        np.savez(file, mean=mean, covariance=covariance, count=np.int64(images))
    typer.echo(f"held-out accuracy {accuracy:.1%} on {int(held_out.sum())} real digits")


if __name__ == "__main__":
    run_function(main)
