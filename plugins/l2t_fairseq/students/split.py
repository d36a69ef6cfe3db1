"""One split of fairseq's data with its reference texts: what a measure is taken on."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from l2t_core.errors import UserError
from l2t_fairseq.corpora.folder import DataFolder
from l2t_fairseq.corpora.text_form import TextForm
from l2t_fairseq.students.batches import unpack
from l2t_fairseq.students.setup import FairseqSetup


class Split:
    """The sentences of split ``name``, and the texts that their translations are scored against.

    A reference is the raw text of the target side, or the target side itself where there is no raw
    text, as ``form`` has it. ``usable`` are the sentences that ``limits``, the model's greatest
    lengths, allow, in order: those that may be drawn or decoded.

    Raises:
        UserError: if the split is missing, empty, or holds no such sentence, or if its text needs
            sacremoses and that is not installed.
    """

    def __init__(
        self, name: str, setup: FairseqSetup, data: DataFolder, form: TextForm, limits: Any,
        device: torch.device,
    ) -> None:
        self.name, self.form, self.device = name, form, device
        self.dataset = setup.dataset(name)
        self._dictionary = setup.task.target_dictionary
        self._raw = data.raw_lines(name, setup.task.cfg.target_lang)
        kept, _ = self.dataset.filter_indices_by_size(numpy.arange(len(self)), limits)
        self.usable: list[int] = kept.tolist()
        if not self.usable:
            raise UserError(f"every sentence of the split {name!r} is longer than the model allows")
        self._references: dict[int, str] = {}
        self.reference(self.usable[0])  # what detokenising needs is missed at once

    def __len__(self) -> int:
        return len(self.dataset)

    def reference(self, index: int) -> str:
        """Return the text that a translation of sentence ``index`` is scored against."""
        if index not in self._references:
            if self._raw is not None:
                text = self.form.detokenised(self._raw[index])
            else:
                text = self.form.of_target(self.dataset[index]["target"], self._dictionary)
            self._references[index] = text
        return self._references[index]

    def collate(self, indices: list[int]) -> Any:
        """Return fairseq's batch of the sentences at ``indices``, its tensors on ``device``."""
        return unpack(self.dataset.collater([self.dataset[i] for i in indices]), self.device)

    def references(self, collated: Any) -> list[str]:
        """Return the references of a batch from :meth:`collate`, in its order."""
        return [self.reference(i) for i in collated["id"].tolist()]

    def draw(self, count: int, seed: int, last: set[int]) -> list[int]:
        """Return ``count`` different sentences, all if there are no more, drawn by ``seed``.

        Those in ``last`` come only when there are no others.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.usable), generator=generator).tolist()
        chosen = [self.usable[i] for i in order]
        return sorted(chosen, key=last.__contains__)[:count] if last else chosen[:count]
