"""Pictures that a training run leaves behind: loss curves and sample grids, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dd_core.files import replacing
from dd_core.sampling import to_pixels


def reconstruction_grid(
    image_B3HW: Tensor, reconstruction_B3HW: Tensor, path: Path, columns: int = 16
) -> None:
    """Rows of images, each above its reconstructions; both in [−1, 1], on any device.

    Of more images than a row has, those in whole rows.
    """
    columns = min(columns, len(image_B3HW))
    shown = len(image_B3HW) // columns * columns
    pairs = zip(
        *(torch.split(part[:shown].cpu(), columns) for part in (image_B3HW, reconstruction_B3HW)), strict=True
    )
    image_grid(torch.cat([part for pair in pairs for part in pair]), path, columns=columns)


_GAP = 4  # pixels between blocks of rows


def image_grid(
    image_B3HW: Tensor, path: Path, *, columns: int, scale: int = 2, block: int | None = None
) -> None:
    """Writes images in [−1, 1], row by row, `scale` screen pixels to a pixel; a gap after `block` rows."""
    pixels = to_pixels(image_B3HW).cpu()
    _, height, width, _ = pixels.shape
    rows = -(-len(pixels) // columns)
    tops = [1 + row * (height + 1) + row // (block or rows) * _GAP for row in range(rows)]
    sheet = torch.full((tops[-1] + height + 1, columns * (width + 1) + 1, 3), 255, dtype=torch.uint8)
    for i, tile in enumerate(pixels):
        y, x = tops[i // columns], 1 + (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = tile
    picture = Image.fromarray(sheet.numpy())
    with replacing(path) as temporary:
        enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        enlarged.save(temporary, format="PNG")


def loss_curve(lines: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plots every figure of a stage's lines against their `step`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = dict.fromkeys(k for line in lines for k in line)
    names = [k for k in found if k != "step"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        marker = "." if len(points) < 20 else ""
        axis.plot(*zip(*points, strict=True), linewidth=1, marker=marker)
        axis.set(title=name, xlabel="step")
        if all(value > 0 for _, value in points):
            axis.set_yscale("log")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    pyplot.close(figure)


def fid_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    teacher: float | None = None,
) -> None:
    """Plots FID against epochs, as the paper's Figures 7 and 8.

    Args:
        panels: a plan's name → a curve's name → (epochs, FID), of each curve at least one point.
        teacher: its FID, a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for label, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        if teacher is not None:
            axis.axhline(teacher, color="gray", linestyle="--", label="teacher")
        ends = [max(points)[0] for points in curves.values()]
        if max(ends) > 3 * min(ends):  # on a linear axis all but the longest curve would be one line
            axis.set_xscale("log")
        axis.set(title=name, xlabel="epochs", ylabel="FID")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
