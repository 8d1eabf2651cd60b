"""fairseq's translation and language-modelling tasks, with generation that reads a given beginning in parallel.

fairseq's search feeds a prompt (``--prefix-size``, or the input of a language model) to the decoder word by word. With
fast weights in the decoder's self-attention the memory after all of its words comes from one parallel pass. What is
generated, and its scores, are the same.
"""

from contextlib import ExitStack
from typing import Any, Optional

from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor


class ParallelPrefixGenerator(SequenceGenerator):
    """fairseq's search; decoders that can read ahead are told what all outputs begin with."""

    def _generate(
        self, sample: dict[str, Any], prefix_tokens: Optional[Tensor] = None, *args: Any, **kwargs: Any
    ) -> list[list[dict[str, Tensor]]]:
        with ExitStack() as stack:
            if prefix_tokens is not None:
                # Words beyond the shortest prefix of the batch are read one by one.
                common = int(prefix_tokens.ne(self.pad).cumprod(dim=1).sum(dim=1).min())
                for model in self.model.models:
                    if common > 1 and _can_read_ahead(model):
                        stack.enter_context(model.decoder.begin_with(prefix_tokens[:, :common]))
            return super()._generate(sample, prefix_tokens, *args, **kwargs)


def _can_read_ahead(model: Any) -> bool:
    can_read_ahead = getattr(getattr(model, "decoder", None), "can_read_ahead", None)
    return can_read_ahead is not None and can_read_ahead()


class _WithParallelPrefix:
    """Mixin for a task whose generator is not chosen by anyone else."""

    def build_generator(
        self, models: Any, args: Any, seq_gen_cls: Any = None, extra_gen_cls_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        if seq_gen_cls is None and not getattr(args, "print_alignment", False):
            seq_gen_cls = ParallelPrefixGenerator
        return super().build_generator(  # type: ignore[misc]
            models, args, seq_gen_cls=seq_gen_cls, extra_gen_cls_kwargs=extra_gen_cls_kwargs, **kwargs
        )


@register_task("fwp_translation", dataclass=TranslationConfig)
class FWPTranslationTask(_WithParallelPrefix, TranslationTask):
    """fairseq's translation; with --prefix-size the prefix is read in parallel."""


@register_task("fwp_language_modeling", dataclass=LanguageModelingConfig)
class FWPLanguageModelingTask(_WithParallelPrefix, LanguageModelingTask):
    """fairseq's language_modeling; prompts are read in parallel."""
