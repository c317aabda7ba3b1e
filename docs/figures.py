"""Tables of the built-in models' figures, from the manifests that the models ship with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dd_core.bundle import find_bundle
from dd_core.manifest import Manifest, PresetEntry, read_manifest
from docs.tables import table

_OTHERS = {
    "reconstruction": "tokenizer alone (real images through it)",
    "real-test": "other real images",
}


def quality(model: str) -> Callable[[], str]:
    """Return a function that makes the table of a model: passes × quality × speed."""

    def of_model() -> str:
        manifest = read_manifest(find_bundle(model))
        by_text = manifest.text is not None
        kept = ("right_caption", "right caption of 100 ↑") if by_text else ("class_accuracy", "right class ↑")
        presets = sorted(manifest.presets, key=lambda p: (not p.offered, -p.cost))
        teacher = next(p.metrics for p in presets if p.name == "teacher")
        rows = [[_name(p, manifest), *_cells(p.metrics, teacher, kept[0], p.cost)] for p in presets]
        rows += [
            [said, *_cells(manifest.metrics[name], teacher, kept[0])]
            for name, said in _OTHERS.items()
            if name in manifest.metrics
        ]
        head = ["sampler", "passes", "FID ↓", "÷ teacher", "KID ·10³ ↓", kept[1], "ms an image", "speed-up"]
        return table(head, rows)

    return of_model


def sameness(model: str) -> Callable[[], str]:
    """Return a function that makes the table of a model: its plans' pictures beside the teacher's."""

    def of_model() -> str:
        manifest = read_manifest(find_bundle(model))
        offered = sorted((p for p in manifest.presets if p.offered), key=lambda p: p.cost)
        rows = [[_name(p, manifest), *_likeness(p.metrics)] for p in offered if "same_answer" in p.metrics]
        if chance := manifest.metrics.get("another-seed"):
            rows.append(["the teacher, another seed", *_likeness(chance)])
        answer = "same caption of 100" if manifest.text is not None else "same class"
        return table(["beside the teacher's picture", "LPIPS", answer, "same main colour"], rows)

    return of_model


def _likeness(found: Mapping[str, float]) -> list[str]:
    return [f"{found['teacher_lpips']:.3f}", *(_percent(found[n]) for n in ("same_answer", "same_colour"))]


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _name(preset: PresetEntry, manifest: Manifest) -> str:
    actors = [actor for actor, _, _ in preset.segments]
    if preset.name == "teacher":
        unit = "scale by scale" if manifest.family == "var" else "token by token"
        return f"teacher, {unit}"
    if set(actors) == {"student"}:
        return f"**DD, {len(actors)} step{'s' if len(actors) > 1 else ''}**"
    if "student" in actors:
        return f"hybrid `{preset.name}`"
    return "baseline onestep\\*" if preset.name == "onestep" else f"baseline {preset.name}"


def _cells(
    found: Mapping[str, float], teacher: Mapping[str, float], kept: str, passes: int | None = None
) -> list[str]:
    time = found.get("ms_per_image")
    return [
        "–" if passes is None else str(passes),
        f"{found['fid']:.1f}",
        "–" if passes is None else f"{found['fid'] / teacher['fid']:.2f}",
        f"{max(0.0, 1000 * found['kid']):.1f}",
        _percent(found[kept]) if kept in found else "–",
        "–" if time is None else f"{time:.0f}",
        "–" if time is None else f"{teacher['ms_per_image'] / time:.1f}×",
    ]
