"""Zero-shot classification: an image gets the class whose text embedding is nearest.

- **Prompt ensembles** (Radford et al., 2021, section 3.1.4): each class name is put into several templates. The class
  vector is the normalised mean of the normalised text embeddings.
- **Ties** are broken at random, and the exact expectation is reported, as in `retrieval`: equal vectors give chance.

From names to class vectors:

    texts = class_prompts(names)
    text_embeds = embed_texts(model, processor, texts)
    class_embeds = zero_shot_classifier(text_embeds.unflatten(0, (len(names), -1)))

Shapes: I images, E embeddings of an image, C classes, P templates, D embedding size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .retrieval import COSINE_TOLERANCE, Array, cosines, first_matches, hit_probability, unit_images, unit_rows

PROMPTS = (
    "{}",
    "a picture of {}",
    "this picture shows {}",
    "what can be seen here is {}",
    "a small drawing of {}",
    "a close view of {}",
)
"""Templates for photographs and drawings. They put no article before the name, so that names may have their own ("an
apple") or none ("rice")."""


def class_prompts(names: Sequence[str], templates: Sequence[str] = PROMPTS) -> list[str]:
    """Every name in every template: `C * P` strings, the prompts of a class in sequence.

    Raises:
        ValueError: if a template has no `{}` for the name.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name: add one")
    return [template.replace("{}", name) for name in names for template in templates]


def zero_shot_classifier(text_embeds: Array) -> torch.Tensor:
    """A unit vector per class, from the embeddings of its prompts (Radford et al., 2021, section 3.1.4).

    Args:
        text_embeds: `(C, P, D)`, any floating type, normalised here.

    Returns:
        `(C, D)`, float32.

    Raises:
        ValueError: if the shape is wrong, or an embedding is not finite.
    """
    prompts = torch.as_tensor(text_embeds)
    if prompts.ndim != 3:
        raise ValueError(f"text_embeds must have shape (classes, templates, size), got {tuple(prompts.shape)}")
    units = unit_rows(prompts.flatten(0, 1), "text_embeds (classes * templates rows)")
    return F.normalize(units.unflatten(0, prompts.shape[:2]).mean(dim=1), dim=-1)


def zero_shot_metrics(
    image_embeds: Array,
    class_embeds: Array,
    labels: Array | Sequence[int],
    *,
    ks: Sequence[int] = (1, 5),
    chunk: int = 256,
) -> dict[str, float]:
    """Top-k accuracy of the nearest class vectors by cosine.

    Args:
        image_embeds: `(I, D)` or `(I, E, D)`, any floating type, normalised here. If an image has several embeddings
            (BLIP-2's queries), the nearest one counts.
        class_embeds: `(C, D)`, from `zero_shot_classifier`.
        labels: `(I,)`, integers in `[0, C)`.
        ks: A hit at k has the true class among the k nearest.
        chunk: Images compared at a time.

    Returns:
        `top{k}` for each k, and `mean_per_class_accuracy`: the mean over classes of their top-1 accuracy. Classes
        without images are left out.

    Raises:
        ValueError: if shapes do not match, an embedding is not finite, or a label is out of range.

    Example:

        metrics = zero_shot_metrics(torch.eye(3), torch.eye(3), labels=[0, 1, 1], ks=(1,))
        print(metrics["top1"])  # 0.667
    """
    images, classes = unit_images(image_embeds), unit_rows(class_embeds, "class_embeds")
    if images.shape[-1] != classes.shape[1]:
        raise ValueError(f"image_embeds have size {images.shape[-1]}, class_embeds {classes.shape[1]}: must be equal")
    labels = _checked_labels(labels, len(images), len(classes))
    class_ids = torch.arange(len(classes))
    places = first_matches(lambda rows: cosines(images[rows], classes), labels, class_ids, chunk, COSINE_TOLERANCE)
    metrics = {f"top{k}": float(hit_probability(places, k).mean()) for k in ks}
    sizes = labels.bincount()
    hits = labels.bincount(weights=hit_probability(places, 1))
    return metrics | {"mean_per_class_accuracy": float((hits[sizes > 0] / sizes[sizes > 0]).mean())}


def _checked_labels(labels: Array | Sequence[int], num_images: int, num_classes: int) -> torch.Tensor:
    values = torch.as_tensor(labels).cpu()
    if values.shape != (num_images,) or values.is_floating_point():
        raise ValueError(f"labels must be {num_images} integers, got {values.dtype} of shape {tuple(values.shape)}")
    wrong = ((values < 0) | (values >= num_classes)).nonzero()
    if len(wrong) > 0:
        row = int(wrong[0])
        raise ValueError(f"label {int(values[row])} of image {row} is not one of the {num_classes} classes")
    return values.long()


__all__ = ["PROMPTS", "class_prompts", "zero_shot_classifier", "zero_shot_metrics"]
