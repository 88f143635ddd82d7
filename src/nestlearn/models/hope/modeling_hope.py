"""Hope language models (section 8.3) and their attention twins, after Hugging Face conventions.

Shapes: B rows, T tokens, D channels. Every block maps (B, T, D) to (B, T, D), state in, state out.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.utils.generic import can_return_tuple

from nestlearn.errors import UserError
from nestlearn.models.hope.block import HopeBlock
from nestlearn.models.hope.cache_hope import HopeCacheLayer
from nestlearn.models.hope.configuration_hope import HopeConfig
from nestlearn.models.hope.next_token import read_and_learn
from nestlearn.models.hope.token_graph import TokenGraph
from nestlearn.nn import CausalConv, ContinuumLevel, ContinuumMemory, MemoryMixer


class HopePreTrainedModel(PreTrainedModel):
    """What all Hope models share: names, abilities and the way fresh weights are drawn."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # transformers then refuses assisted decoding, which has to take tokens back

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Without the flag that transformers passes for classes from elsewhere: with it, a module that has only
        # submodules' parameters, such as the Titans layer, counts as loaded and is left without its own start.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CausalConv | MemoryMixer | ContinuumMemory | ContinuumLevel):
            # These draw what is theirs themselves. Those that a checkpoint brought stay as they are.
            own = isinstance(module, ContinuumMemory | ContinuumLevel)  # their linear layers are drawn as all others
            parameters = list(module.parameters(recurse=not own))
            loaded = [(p, p.clone()) for p in parameters if getattr(p, "_is_hf_initialized", False)]
            if len(loaded) < len(parameters):
                module.reset_parameters()
            for parameter, value in loaded:
                parameter.copy_(value)
        else:
            super()._init_weights(module)


class HopeModel(HopePreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        if config.block_types is not None:  # who lowers num_hidden_layers by hand gets the first blocks, as of a Llama
            config.block_types = config.block_types[: config.num_hidden_layers]
        config.validate_layer_type()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HopeBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.token_graph: TokenGraph | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: the new tokens; or ``inputs_embeds``, their embeddings.
            attention_mask: (B, T) or (B, past + T), zero where a row holds filler, which may stand anywhere: it
                changes no state and no position. Hidden states at filler are zero.
            past_key_values: the state after earlier tokens, read and updated in place.
            use_cache: whether to return the state; by default ``config.use_cache`` outside training.
            output_hidden_states: whether to return those after the embedding and after every block too.

        Raises:
            UserError: inputs that do not fit one another or ask for what the model cannot give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds to a Hope model, not both or neither")
        for name in ("position_ids", "output_attentions", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise UserError(f"a Hope model has no {name}: leave it out")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise UserError("gradient checkpointing replays a block, so it cannot update past_key_values")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self.check_cache(past_key_values, hidden_states)

        valid = valid_columns(attention_mask, hidden_states)
        lengths = front = back = None
        if valid is not None:
            # Once for all blocks: the valid tokens of each row go to its front, and back at the end.
            lengths = valid.sum(1)
            front = torch.argsort((~valid).byte(), dim=1, stable=True)
            back = torch.argsort(front, dim=1)
        hidden_states = permute(hidden_states, front)

        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        collected = []
        recorded = None
        if self.token_graph is not None and past_key_values is not None and front is None and not collect:
            recorded = self.token_graph(hidden_states, past_key_values.layers)  # type: ignore[arg-type]
        for block in self.layers if recorded is None else ():
            if collect:
                # There and back again, so that what is returned has its gradient.
                collected.append(permute(hidden_states, back))
                hidden_states = permute(collected[-1], front)
            hidden_states = block(hidden_states, lengths=lengths, past_key_values=past_key_values)
        hidden_states = permute(self.norm(hidden_states if recorded is None else recorded), back)
        if valid is not None:
            # Filler went behind the tokens and has seen all of them: a loss made of it would be told the answer.
            hidden_states = hidden_states.masked_fill(~valid[..., None], 0.0)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*collected, hidden_states) if collect else None,
        )

    def check_cache(self, cache: Cache, inputs: Tensor) -> None:
        """Refuse a cache of another model or another number of rows than ``inputs`` (B, ...)."""
        layers = cache.layers
        if len(layers) != len(self.layers) or not all(isinstance(layer, HopeCacheLayer) for layer in layers):
            raise UserError("past_key_values does not fit this model: make it by DynamicCache(config=model.config)")
        if cache.offloading:
            raise UserError("a Hope model's cache cannot be offloaded: leave cache_implementation out")
        size = cache.batch_size
        if size not in (-1, inputs.shape[0]):
            raise UserError(
                f"past_key_values holds {size} rows, but the input has {inputs.shape[0]}: "
                "repeat the cache with batch_repeat_interleave, or start a new one"
            )


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """Hope with a language modelling head; ``block_types`` chooses Hope, Hope-Attention or Transformer++ blocks.

    ``generate()`` carries a state whose size does not grow with the text in "hope" blocks.

    PEFT's LoRA is for linear layers: name them so that no memory of the same name is meant, as "project.k" and
    "project.v" (a "k" alone is also the start of a memory, which PEFT refuses). LN tuning is for "norm".

    >>> model = HopeForCausalLM(HopeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model = HopeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token and, given ``labels``, the mean cross entropy in nats per token.

        Args:
            labels: token ids as in ``input_ids``, -100 where there is nothing to predict; they are shifted here,
                and those that a column of filler would predict are left out.
            logits_to_keep: how many of the last columns to give logits for, 0 for all; or their indices.

        The other arguments are those of :meth:`HopeModel.forward`.
        """
        inputs = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        run = self.model if not self.learns_next_token else self._read_and_learn
        outputs = run(**inputs, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        hidden = outputs.last_hidden_state
        assert hidden is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            scored = labels
            if attention_mask is not None:
                # What a filler column predicts is meaningless.
                filler = attention_mask[:, attention_mask.shape[1] - labels.shape[1] : -1] == 0
                scored = labels.masked_fill(F.pad(filler, (1, 0)), -100)
            loss = self.loss_function(logits=logits, labels=scored, vocab_size=self.vocab_size, **kwargs)
            if scored is not labels and kwargs.get("num_items_in_batch") is not None:
                # The Trainer divides by all labels that it gave.
                given, counted = ((some[:, 1:] != -100).sum() for some in (labels, scored))
                loss = loss * given / counted.clamp(min=1)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def use_cuda_graph(self, on: bool = True) -> None:
        """From now on decode with a recorded CUDA graph for every token inside a chunk (`token_graph`), or without.

        Worth it where launching kernels is what a token costs: few rows, a small model. Raises `UserError` for a model
        that is not on a CUDA device.
        """
        if on and self.device.type != "cuda":
            raise UserError(f"a CUDA graph needs a CUDA device and the model is on {self.device}: move it there first")
        self.model.token_graph = TokenGraph(list(self.model.layers)) if on else None  # type: ignore[arg-type]

    @property
    def learns_next_token(self) -> bool:
        """Whether levels learn from this model's own next-token loss while it reads."""
        return any(block.memory.online == "next-token" for block in self.model.layers)  # type: ignore[union-attr]

    def _read_and_learn(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """:meth:`HopeModel.forward`, and the levels learn from the next-token loss."""
        if input_ids is None or inputs_embeds is not None:
            raise UserError("levels that learn from the next-token loss need the tokens: give input_ids")
        if valid_columns(attention_mask, input_ids[..., None]) is not None:
            raise UserError(
                "levels that learn from the next-token loss need rows without filler: give rows of equal length, "
                "or one at a time"
            )
        if self.model.gradient_checkpointing and self.training:
            raise UserError('gradient checkpointing replays a block, so cms_online="next-token" cannot use it')
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        self.model.check_cache(cache, input_ids)

        pieces: list[tuple[Tensor, ...]] = []  # the states of each read, where they are asked for
        outer = torch.is_grad_enabled()

        def read(tokens: Tensor, cache: Cache) -> Tensor:
            outputs = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **kwargs)
            if outputs.hidden_states is not None:
                pieces.append(tuple(h if outer else h.detach() for h in outputs.hidden_states))
            return outputs.last_hidden_state

        memories = [block.memory for block in self.model.layers]
        hidden = read_and_learn(read, self.lm_head, memories, input_ids, cache)  # type: ignore[arg-type]
        # Before the new tokens stand those of an open segment, which were read again.
        new = [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]
        states = tuple(h[:, h.shape[1] - hidden.shape[1] :] for h in new)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache if use_cache else None, hidden_states=states or None
        )

    # config.max_position_embeddings is a record and no limit: no default length ends there, and no warning is due.

    def _prepare_generated_length(self, **kwargs: Any) -> GenerationConfig:  # type: ignore[override]
        default = kwargs["generation_config"].max_length  # new tokens
        config = super()._prepare_generated_length(**kwargs)  # type: ignore[misc]
        if kwargs["has_default_max_length"] and config.max_new_tokens is None:
            config.max_length = default + kwargs["input_ids_length"]
        return config

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def _prepare_static_cache(self, cache_implementation: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            f"a Hope model has no cache_implementation={cache_implementation!r}: leave it out, the state of "
            '"hope" blocks has a constant size anyway'
        )


def valid_columns(mask: Tensor | None, hidden_states: Float[Tensor, "B T D"]) -> Bool[Tensor, "B T"] | None:
    """Which of the new columns are valid; None if all are (one device synchronisation to find out)."""
    if mask is None:
        return None
    B, T = hidden_states.shape[:2]
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise UserError(
            f"attention_mask of shape {tuple(mask.shape)} for {B} rows of {T} tokens: it must be two-dimensional, "
            "one row per sequence, and cover at least the new tokens"
        )
    valid = mask[:, mask.shape[1] - T :].bool()
    return None if valid.all() else valid


def permute(states: Float[Tensor, "B T D"], order: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
    """Reorder the columns of each row; None leaves them."""
    return states if order is None else states.gather(1, order[..., None].expand_as(states))


AutoModel.register(HopeConfig, HopeModel)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM)
# By this table the Trainer knows whose labels it has to shift where it takes the loss itself (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HopeConfig.model_type] = HopeForCausalLM.__name__
