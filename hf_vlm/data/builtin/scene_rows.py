"""Scenes as rows, each generated on access: captions or questions for training."""

from typing import Any

from .scenes import SceneStream


class SceneRows:
    """The first scenes of a stream as rows for [`PairDataset`] and [`QuestionDataset`].

    Args:
        stream: The stream.
        num_scenes: Number of scenes. Generating a scene takes half a millisecond; scenes are not kept in memory.
        max_words: Drop longer captions, because a batch is padded to its longest caption.

    Indexing gives dicts with `image`, `caption` (all true captions), `questions` (dicts with `question`, `answer` and
    `kind`) and `id`, the scene's number.
    """

    def __init__(self, stream: SceneStream, num_scenes: int, max_words: int | None = None):
        self.stream = stream
        self.num_scenes = num_scenes
        self.max_words = max_words

    @property
    def key(self) -> dict[str, Any]:
        """The settings that the images depend on, for the key of a feature cache."""
        stream = self.stream
        key = {"path": "scenes", "split": stream.split, "seed": stream.seed, "size": stream.size}
        return key if stream.aspects == (1.0,) else key | {"aspects": stream.aspects}

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"There is no scene {index}: scenes are numbered 0 to {self.num_scenes - 1}.")
        scene = self.stream.scene(index)
        return {
            "image": scene["image"],
            "caption": self.short(scene["captions"]),
            "questions": scene["questions"],
            "id": index,
        }

    def short(self, captions: list[str]) -> list[str]:
        """The captions of at most `max_words`, or else the shortest."""
        if self.max_words is None:
            return captions
        kept = [caption for caption in captions if len(caption.split()) <= self.max_words]
        return kept or [min(captions, key=len)]


__all__ = ["SceneRows"]
