"""The sets of images that an evaluation measures: drawn by plans, reconstructed, real; with their features.

Of several ranks each draws and extracts its share, and has all in the end.

Shapes: N images, D features, H W pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.files import metadata_of, save_tensors
from dd_core.models.build import AnyTokenizer
from dd_core.plan import Plan
from dd_core.sampling import Sampler, sample_images, to_pixels
from training import parallel
from training.data.conditions import Conditions
from training.data.images import ImageSet, scaled
from training.metrics.features import Extractor, features_of, real_store
from training.metrics.rows import fingerprint_of
from training.recipes.settings import EvaluateRecipe

log = logging.getLogger("dd_train")

_AGAIN = 500  # pictures of another seed: LPIPS of so many has a standard error of 1 %


@dataclass(frozen=True)
class Sets:
    """The sets, in the folder `out` as far as they are there.

    Args:
        reference, test: real images, and others of the same kind.
        to_reconstruct: what the tokenizer reconstructs.
        made: settings, besides the weights and the plan, that drawn images follow from.
        weights: a hash for each part of the sampler.
    """

    sampler: Sampler
    recipe: EvaluateRecipe
    reference: ImageSet
    test: ImageSet
    to_reconstruct: Tensor
    conditions: Conditions
    extractor: Extractor
    weights: Mapping[str, str]
    made: Mapping[str, object]
    seed: int
    out: Path

    @cached_property
    def real(self) -> dict[str, Tensor]:
        """Real images by what they are called."""
        half = len(self.test.images) // 2
        return {
            "reference": self.reference.images,
            "test images": self.test.images[: self.recipe.images],
            "first half": self.test.images[:half],
            "second half": self.test.images[half : 2 * half],
        }

    def features(self, name: str, image_NHW3: Tensor) -> Tensor:
        """Features `[N, D]` of images of ours."""
        pixels = image_NHW3.permute(0, 3, 1, 2).contiguous()
        return features_of(pixels, self.extractor, self.out / "features", name)

    def real_features(self, name: str) -> Tensor:
        """Features `[N, D]` of a set of real images."""
        return features_of(self.real[name], self.extractor, real_store(), name)

    def share(self, plans: Sequence[Plan]) -> None:
        """Draw and extract this rank's share of all sets, for one of them to find on disk."""
        for plan in plans:
            self.features(plan.name, self.drawn(plan)[0])
        self.features("reconstruction", self.reconstructed())
        for name in self.real:
            self.real_features(name)
        if self.recipe.images < 2 * self.conditions.count:  # not every condition has two
            again = self.again()
            for plan in (p for p in plans if p.name == "teacher"):
                again.features(plan.name, again.drawn(plan)[0])

    def again(self) -> Sets:
        """These sets of another seed, of the first conditions."""
        count = min(_AGAIN, self.conditions.count, self.recipe.images)
        seed, out = self.seed + 3, self.out / "another-seed"  # an evaluation's is the recipe's + 2, FID's + 4
        made = {**self.made, "seed": seed, "images": count}
        return replace(self, recipe=replace(self.recipe, images=count), made=made, seed=seed, out=out)

    def key(self, plan: Plan) -> dict[str, object]:
        """All that a plan's images follow from."""
        weights = {part: self.weights[part] for part in sorted({"tokenizer", *plan.needs})}
        drawing = {"draw": repr(self.sampler.draw), "flow": repr(self.sampler.flow)}
        return {**self.made, "weights": weights, "plan": asdict(plan), **drawing}

    def drawn(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """A plan's images `[N, H, W, 3]` and labels `[N]`.

        The file is rewritten at every tenth of the way, so a killed run loses no more than that.
        """
        path, fingerprint = self.out / "samples" / f"{plan.name}.safetensors", fingerprint_of(self.key(plan))
        path.parent.mkdir(parents=True, exist_ok=True)
        count, batch = self.recipe.images, self.recipe.batch
        parts: list[Tensor] = []
        if metadata_of(path).get("fingerprint") == fingerprint:
            parts = [load_file(path)["images"]]
        done = len(parts[0]) if parts else 0
        labels = torch.arange(count) % self.conditions.count
        saved, began, start = done, time.perf_counter(), done
        parallel.agree(done)
        while done < count:
            stop = min(done + batch * parallel.own_rows().step, count)
            parts.append(self._some(plan, labels, range(done, stop)))
            done = stop
            if parallel.is_main() and (done == count or done - saved >= max(batch, count // 10)):
                images = {"images": torch.cat(parts), "labels": labels[:done].clone()}
                save_tensors(images, path, {"fingerprint": fingerprint})
                saved = done
                rate = (done - start) / (time.perf_counter() - began)
                log.info(
                    "%s: %d/%d images %.1f/s %.0fs left", plan.name, done, count, rate, (count - done) / rate
                )
        return torch.cat(parts), labels

    def _some(self, plan: Plan, labels: Tensor, index: range) -> Tensor:
        """The images `[N, H, W, 3]` of some indices, of which every rank draws a batch in turn."""
        side, batch = self.reference.images.shape[-1], self.recipe.batch
        images = torch.zeros(len(index), side, side, 3, dtype=torch.uint8)
        for i in range(0, len(index), batch)[parallel.own_rows()]:
            part = index[i : i + batch]
            cond = self.conditions(labels[part.start : part.stop])
            images[i : i + batch] = sample_images(self.sampler, plan, cond, [(self.seed, k) for k in part])
        return parallel.summed(images)

    @torch.inference_mode()
    def reconstructed(self) -> Tensor:
        """Images through the tokenizer and back, `[N, H, W, 3]` uint8."""
        tokenizer, parts = self.sampler.tokenizer, []
        assert isinstance(tokenizer, AnyTokenizer), "one that was prepared for inference has no encoder"
        for part in torch.split(self.to_reconstruct, self.recipe.batch):
            x = scaled(part.to(self.sampler.device))
            codes = lookup(tokenizer.codebook_VC, tokenizer.encode(x))
            parts.append(to_pixels(tokenizer.to_image(codes)).cpu())
        return torch.cat(parts)
