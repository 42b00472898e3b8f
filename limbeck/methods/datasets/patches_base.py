"""Selections whose images may lose their least important patches, and how these are filled in again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.adapters.patch_tokens import patch_decoder, patch_encoder
from limbeck.blocks.gradcam import importance_maps
from limbeck.blocks.masking import TokenMask, masked_mse, patchify
from limbeck.blocks.patch_store import MaskedAutoencoder, PatchStore, Reconstructor, keep_important
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, TrainingConfig, make_optimised, trainable
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.methods.datasets.selection_base import EmbeddingSelection
from limbeck.networks.mae import MAEViT, build_decoder, fitting_sizes

MASKED = 0.5  # share of patches hidden while the reference autoencoder learns
AUTOENCODER = {"width": 64, "depth": 4, "heads": 4}
DECODER = {"width": 32, "depth": 2, "heads": 4}


class PatchDropping(EmbeddingSelection):
    """Base: with ``drop`` above 0, patches in which Grad-CAM finds least evidence are dropped, and filled in again on use.

    Args:
        data, network, encoder, config, embeddings, seed, class_names: see :class:`EmbeddingSelection`. With ``drop`` the encoder must be
            a classifier, which Grad-CAM asks.
        reconstructor: fills dropped patches: a masked autoencoder such as ``ViTMAEForPreTraining`` (trained without ``norm_pix_loss``),
            or a function as :data:`limbeck.blocks.patch_store.Reconstructor`. None: as ``fill`` says.

    Raises:
        InputError: patches dropped without a classifier, or from samples that are no images.
    """

    class Config(EmbeddingSelection.Config):
        drop: float = Field(
            0.0, ge=0, lt=1, description="θ: part of each image's patches to drop; published 0.2 or 0.25"
        )
        patch: int | None = Field(
            None, ge=1, description="side of a patch, pixels; none: the autoencoder's, or 8 a side"
        )
        fill: Literal["mae", "mean"] = Field(
            "mae", description="what fills dropped patches: a masked autoencoder trained here, or the mean colour"
        )
        autoencoder_steps: int = Field(1000, ge=1, description="updates of the masked autoencoder, if one is trained")
        autoencoder_lr: float = Field(2e-3, gt=0, description="its peak learning rate (AdamW, cosine)")
        cam_layer: str | None = Field(None, description="layer for Grad-CAM; none: the last one that gives maps")

    learnt: Tensor

    def __init__(
        self,
        data: Any,
        network: Any = None,
        encoder: nn.Module | None = None,
        config: Any = None,
        *,
        reconstructor: nn.Module | Reconstructor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, network, encoder, config, **options)
        self.autoencoder: nn.ModuleList | None = None
        self.register_buffer("learnt", torch.zeros((), dtype=torch.long))  # updates of the autoencoder so far
        if self.config.drop:
            self._prepare_patches(reconstructor)

    @classmethod
    def wants_encoder(cls, config: Any) -> bool:
        return super().wants_encoder(config) or config.drop > 0

    def _prepare_patches(self, reconstructor: nn.Module | Reconstructor | None) -> None:
        sample = self.real.fetch(torch.arange(1), None).inputs
        if not isinstance(sample, Tensor) or sample.ndim != 4:
            raise InputError("patches can be dropped from images (N, C, H, W) alone: set drop=0")
        if self.encoder is None:
            raise InputError("to drop patches a classifier must say which matter: give encoder=…")
        shape = tuple(sample.shape[1:])
        patch = self.config.patch
        if isinstance(reconstructor, nn.Module):
            reconstructor = as_reconstructor(reconstructor)
            self.add_frozen("filler", reconstructor)
        elif reconstructor is None and self.config.fill == "mae":
            patch = patch or fitting_patch(shape)
            with preserved_random_state():
                seed_everything(mix_seed(self.seed, 53))
                model = MAEViT(shape, self.num_classes, patch=patch, **AUTOENCODER)
                self.autoencoder = nn.ModuleList([model, build_decoder(patch_encoder(model), **DECODER)])
            reconstructor = as_reconstructor(*self.autoencoder)
        if isinstance(reconstructor, MaskedAutoencoder):
            own = reconstructor.encoder.patch
            if patch is not None and patch != own:
                raise InputError(f"patch {patch} differs from the autoencoder's patches of {own} pixels: leave it out")
            reconstructor.encoder.check(sample, "the masked autoencoder")
            patch = own
        self.patch = patch or fitting_patch(shape)
        # in a tuple, so that the autoencoder's parts are not registered a second time
        self._fill = (reconstructor,)
        patchify(sample[:1], self.patch)  # patches that do not tile the images are refused here

    def autoencoder_losses(self, batch: Batch) -> Losses:
        """Squared error of the pixels of hidden patches, on unaugmented images."""
        assert self.autoencoder is not None and batch.index is not None
        images = self.real.fetch(batch.index.cpu(), None).inputs.to(self.device)
        encoder, decoder = patch_encoder(self.autoencoder[0]), patch_decoder(self.autoencoder[1])
        assert decoder is not None
        mask = TokenMask.draw(len(images), encoder.patches, MASKED, images.device)
        predicted = decoder.pixels(decoder.hidden(encoder(images, mask).latent, mask))
        return Losses(pixels=masked_mse(predicted, patchify(images, self.patch), mask.removed))

    def autoencoder_stages(self, seed: int) -> list[Stage]:
        """The stage that trains the masked autoencoder, where there is one to train."""
        if self.autoencoder is None:
            return []
        return [
            Stage(
                "autoencoder",
                self.config.autoencoder_steps,
                Stream(self.real, 64, seed=mix_seed(seed, 5)),
                losses=self.autoencoder_losses,
                optimisers=self.autoencoder_optimisers,
                after_step=self._count_update,
            )
        ]

    def _count_update(self, step: int) -> None:
        self.learnt.fill_(step)

    def autoencoder_optimisers(self) -> Mapping[str, Optimised]:
        assert self.autoencoder is not None
        c = self.config
        recipe = TrainingConfig.make(
            steps=c.autoencoder_steps, lr=c.autoencoder_lr, weight_decay=0.05, betas=(0.9, 0.95), warmup=0.1
        )
        return {"autoencoder": make_optimised(trainable(self.autoencoder), recipe, c.autoencoder_steps)}

    def patches(self, made: DistilledDataset | None = None) -> PatchStore:
        """The images of a data set without their least important patches; None: those that were chosen.

        Raises:
            InputError: ``drop`` is 0.
        """
        if not self.config.drop or self.encoder is None:
            raise InputError("no patches are dropped: set drop above 0")
        made = super().distilled() if made is None else made
        grid = (made.inputs.shape[2] // self.patch, made.inputs.shape[3] // self.patch)
        importance = importance_maps(self.encoder, made.inputs, self.config.cam_layer, grid)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 97))
        kept = keep_important(importance, self.config.drop, generator)
        return PatchStore.of(made.pixels() if len(made.mean) else made.inputs, kept, self.patch)

    def filled(self, store: PatchStore) -> Tensor:
        """(N, C, H, W) images of a store with dropped patches filled in, in the space of the method's inputs.

        Raises:
            InputError: the autoencoder that fills them was not trained yet.
        """
        if self.autoencoder is not None and not self.learnt:
            raise InputError("the masked autoencoder has learnt nothing yet: run the stages (limbeck.fit)")
        mean, std = getattr(self.real, "mean", None), getattr(self.real, "std", None)
        known = store.patches.dtype == torch.uint8
        images = store.reconstruct(
            self._fill[0], mean=mean if known else None, std=std if known else None, device=self.device
        )
        if not known:
            return images
        centre, scale = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
        return (images.float() / 255 - centre) / scale

    # ---- results -----------------------------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        """The chosen samples, with dropped patches filled in.

        Its bytes are those of whole images: with ``drop``, :meth:`patches` is what takes less, beside a reconstructor.
        """
        made = super().distilled()
        return made if not self.config.drop else self._refilled(made)

    def dataset_of(self, ids: Tensor) -> DistilledDataset:
        """The samples with these ids, with dropped patches filled in."""
        made = self.as_dataset(*self.real_samples(ids), index=ids)
        return made if not self.config.drop else self._refilled(made)

    def _refilled(self, made: DistilledDataset) -> DistilledDataset:
        made.inputs = self.filled(self.patches(made))
        return made

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Besides the family's judgement: what dropping patches saves."""
        found = super().evaluate(test, class_names)
        if self.config.drop:
            found["patches"] = {"bytes": self.patches().bytes, "reconstructor_bytes": self.reconstructor_bytes}
        return found

    @property
    def reconstructor_bytes(self) -> int:
        """What the network that fills dropped patches takes."""
        fill = self._fill[0]
        return sum(p.numel() * p.element_size() for p in fill.parameters()) if isinstance(fill, nn.Module) else 0

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The data set; and the patches that are kept (``patches.safetensors``), where some are dropped."""
        super().save_artifact(folder, description)
        if self.config.drop:
            self.patches().save(folder / "patches.safetensors")


def as_reconstructor(model: nn.Module, decoder: nn.Module | None = None) -> MaskedAutoencoder:
    """A masked autoencoder of any library as what fills dropped patches.

    Args:
        model: with an encoder, and a decoder if none is given; see :mod:`limbeck.adapters.patch_tokens`.
        decoder: a ``ViTMAEDecoder``.

    Raises:
        InputError: no vision transformer, or no decoder.
    """
    if isinstance(model, MaskedAutoencoder):
        return model
    found = patch_decoder(model if decoder is None else decoder)
    if found is None:
        raise InputError(f"{type(model).__name__} has no decoder to fill patches with: give a ViTMAEForPreTraining")
    return MaskedAutoencoder(patch_encoder(model), found)


def fitting_patch(in_shape: Sequence[int]) -> int:
    """The side of the patches that a masked autoencoder for such images has here.

    Raises:
        InputError: see :func:`limbeck.networks.mae.fitting_sizes`.
    """
    return int(fitting_sizes(tuple(in_shape))[0].rpartition("p")[2])
