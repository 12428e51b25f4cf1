"""Which model made the embeddings of an index, so that those of another are refused."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..models import VlmClipModel

FORMAT = 1


@dataclass(frozen=True)
class ModelIdentity:
    """What an index remembers of its model.

    Args:
        model: Folder (absolute) or Hub id that it was loaded from; empty if it was never saved.
        revision: The commit on the Hub, where it came from there.
        digest: Of the weights, see [`weights_digest`].
        dim: Size of an embedding.
        hf_vlm: The version of this package that wrote the index.
        format: Of this record.
    """

    model: str
    revision: str | None
    digest: str
    dim: int
    hf_vlm: str
    format: int = FORMAT

    @classmethod
    def of(cls, model: VlmClipModel) -> "ModelIdentity":
        """The identity of a model in memory."""
        name = model.name_or_path
        name = str(Path(name).resolve()) if name and Path(name).is_dir() else name
        revision, version = vars(model.config).get("_commit_hash"), importlib.metadata.version("hf-vlm")
        return cls(name, revision, weights_digest(model), model.config.projection_dim, version)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelIdentity":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if a newer version of this package wrote it.
        """
        record = json.loads(text)
        if record["format"] > FORMAT:
            raise ValueError(f"The index was written by hf_vlm {record['hf_vlm']}: update this hf_vlm to read it.")
        return cls(**record)

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        revision = f" at {self.revision[:8]}" if self.revision else ""
        return f"{self.model or 'an unsaved model'}{revision} (weights {self.digest[:8]})"

    def check(self, model: VlmClipModel, uri: str) -> None:
        """Refuses another model.

        Raises:
            ValueError: if its weights are not those that made the index.
        """
        other = ModelIdentity.of(model)
        if (other.digest, other.dim) != (self.digest, self.dim):
            raise ValueError(f"{uri} holds embeddings of {self}, not of {other}: use that model or build a new index.")

    def load(self) -> tuple[VlmClipModel, ProcessorMixin]:
        """The model and its processor, from where they were when the index was built.

        Raises:
            ValueError: if they are not there any more.
        """
        if not self.model:
            raise ValueError("The index does not know where its model is saved: pass the model and its processor.")
        try:
            return load_model(self.model, self.revision)
        except OSError as error:
            raise ValueError(
                f"The index was built with {self}, which cannot be loaded: say where it is now."
            ) from error


def load_model(source: str, revision: str | None = None) -> tuple[VlmClipModel, ProcessorMixin]:
    """Model and processor from a folder or the Hub.

    Raises:
        ValueError: if it is of another architecture.
    """
    model: PreTrainedModel = AutoModel.from_pretrained(source, revision=revision)
    if not isinstance(model, VlmClipModel):
        raise ValueError(f"{source} is a {model.config.model_type} model: an index needs a vlm_clip model.")
    return model.eval(), AutoProcessor.from_pretrained(source, revision=revision)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names and values of all weights, the latter as bfloat16.

    So a checkpoint loaded in float32 and in bfloat16 is one model, while a step of training makes another: of millions
    of weights some cross a rounding limit.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["ModelIdentity", "load_model", "weights_digest"]
