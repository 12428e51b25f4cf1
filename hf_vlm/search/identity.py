"""Identity of the model whose embeddings an index holds. Embeddings of any other model are refused."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, ProcessorMixin

from ..checkpoints import load_complete, read_config
from ..models import VlmClipConfig, VlmClipModel

FORMAT = 1


@dataclass(frozen=True)
class ModelIdentity:
    """The model of an index.

    Args:
        model: Absolute folder or Hub id that the model was loaded from; empty if it was never saved.
        revision: Commit of a model from the Hub.
        digest: Digest of the weights; see [`weights_digest`].
        dim: Size of an embedding.
        hf_vlm: Version of hf_vlm that wrote the index.
        format: Version of this record's format.
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
        """The identity from the output of `to_json`.

        Raises:
            ValueError: if a newer version of hf_vlm wrote it.
        """
        record = json.loads(text)
        if record["format"] > FORMAT:
            raise ValueError(f"The index was written by hf_vlm {record['hf_vlm']}: update hf_vlm to read it.")
        return cls(**record)

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        revision = f" at {self.revision[:8]}" if self.revision else ""
        return f"{self.model or 'an unsaved model'}{revision} (weights {self.digest[:8]})"

    def check(self, model: VlmClipModel, uri: str) -> None:
        """Checks that a model is the index's own.

        Raises:
            ValueError: if its weights differ from those that made the index.
        """
        other = ModelIdentity.of(model)
        if (other.digest, other.dim) != (self.digest, self.dim):
            raise ValueError(f"{uri} holds embeddings of {self}, not of {other}: use that model or build a new index.")

    def load(self) -> tuple[VlmClipModel, ProcessorMixin]:
        """The model and its processor, loaded from where they were when the index was built.

        Raises:
            ValueError: if they cannot be loaded from there.
        """
        if not self.model:
            raise ValueError("The index was built with a model that was never saved: pass the model and its processor.")
        try:
            return load_model(self.model, self.revision)
        except OSError as error:
            raise ValueError(
                f"The index was built with {self}, which cannot be loaded: pass the model, or say where it is now."
            ) from error


def load_model(source: str, revision: str | None = None) -> tuple[VlmClipModel, ProcessorMixin]:
    """Model and processor from a folder or the Hub.

    Raises:
        ValueError: if the model is not a CLIP of hf_vlm, or its weights are not exactly those of its class.
    """
    config = read_config(source, revision=revision)
    if config.model_type != VlmClipConfig.model_type:
        raise ValueError(f"{source} is a {config.model_type} model; an index needs a vlm_clip model.")
    model = load_complete(VlmClipModel, source, revision=revision)
    return model.eval(), AutoProcessor.from_pretrained(source, revision=revision)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names and the bfloat16 values of all weights.

    A checkpoint has the same digest when loaded in float32 and in bfloat16. One training step changes it, because some
    of millions of weights round differently.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["ModelIdentity", "load_model", "weights_digest"]
