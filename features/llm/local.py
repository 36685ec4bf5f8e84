"""A chat model of the Hugging Face kind, run in this process."""

from threading import Lock
from typing import Any

from activations.errors import InputError
from features.llm.chat import NoReply, Reply, Request


class LocalModel:
    """Answers through ``transformers``' ``generate`` and the model's own chat template, one request at a time.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        device: where it runs; None takes the CUDA device if there is one.

    Raises:
        InputError: it cannot be read, or has no chat template.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        from activations.files import hash_tensors
        from activations.loading import load_folder, locate, resolve_device, resolve_dtype

        chosen = resolve_device(device)
        self._model, self._tokenizer = load_folder(locate(name), chosen, resolve_dtype(None, chosen))
        if not self._tokenizer.chat_template:
            raise InputError(
                f"{name} has no chat template: give a model that was trained to follow instructions."
            )
        # A folder may hold other weights tomorrow: the cache must not answer for them.
        self._name = f"{name.rstrip('/').rsplit('/', 1)[-1]}@{hash_tensors(self._model.state_dict())[:8]}"
        self._lock = Lock()

    @property
    def name(self) -> str:
        """Its name and the beginning of the hash of its weights."""
        return self._name

    @property
    def endpoint(self) -> str:
        """Empty: the name says which weights."""
        return ""

    def reply(self, request: Request) -> Reply:
        """Ask once; see :class:`features.llm.chat.Chat`."""
        import torch

        from activations.loading import quiet_transformers

        with self._lock, quiet_transformers(), torch.no_grad(), torch.random.fork_rng():
            prompt = self._prompt(request)
            n_prompt = int(prompt["input_ids"].shape[1])
            limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
            if limit is not None and n_prompt + request.max_tokens > limit:
                raise NoReply(
                    f"the prompt of {n_prompt:,} tokens and a reply of {request.max_tokens:,} do not fit into the"
                    f" {limit:,} of the model",
                    again=False,
                )
            torch.manual_seed(request.seed)
            sampling: dict[str, Any] = (
                {"do_sample": True, "temperature": request.temperature, "top_p": 1.0, "top_k": 0}
                if request.temperature > 0
                else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            )
            padding = self._tokenizer.pad_token_id
            out = self._model.generate(
                **prompt,
                max_new_tokens=request.max_tokens,
                pad_token_id=self._tokenizer.eos_token_id if padding is None else padding,
                **sampling,
            )[0, n_prompt:]
        text = self._tokenizer.decode(out, skip_special_tokens=True)
        return Reply(text, "length" if len(out) >= request.max_tokens else "stop", "", n_prompt, len(out))

    def _prompt(self, request: Request) -> Any:
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        try:
            found = self._render(messages)
        except Exception:  # some templates know no system role
            first, *rest = messages
            merged = {"role": "user", "content": f"{first['content']}\n\n{rest[0]['content']}"}
            found = self._render([merged, *rest[1:]])
        return {name: found[name].to(self._model.device) for name in ("input_ids", "attention_mask")}

    def _render(self, messages: list[dict[str, str]]) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
