"""What is added to vLLM's workers, by its ``--worker-extension-cls``: methods that the engine calls on each of them."""

from __future__ import annotations

from typing import Any


class Extension:
    """Mixed into vLLM's worker class. Names must not clash with its own."""

    model_runner: Any

    def p2pdyn_seeds(self) -> bool:
        """On CPU: let the generators of seeded requests sit out steps that compute only a part of their prompts. vLLM
        samples in these too, and winds the generators back; those on CPU cannot be, and that exception ends the engine.
        Answers False where the model runner does not work like that."""
        runner = self.model_runner
        sample, discard = getattr(runner, "sample_tokens", None), getattr(runner, "discard_request_mask", None)
        if sample is None or discard is None:
            return False

        def sample_tokens(*args: Any, **named: Any) -> Any:
            generators = runner.input_batch.generators  # by row
            apart = {row: generators.pop(row) for row in list(generators) if discard.np[row]}
            try:
                return sample(*args, **named)
            finally:
                generators.update(apart)

        runner.sample_tokens = sample_tokens
        return True

    def p2pdyn_release(self, request: str) -> bool:
        """Let a finished prefill's blocks go now instead of at the end of their lease: nobody will read them. Its
        deadline becomes the past, so the connector's next look at expired leases frees the blocks as it always does.
        Answers False where there is nothing to release, or where this version keeps its leases elsewhere."""
        from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group, has_kv_transfer_group

        if not has_kv_transfer_group():
            return False
        worker = getattr(get_kv_transfer_group(), "connector_worker", None)
        leases = getattr(worker, "_reqs_to_send", None)
        if not isinstance(leases, dict) or request not in leases:
            return False
        rest = {other: until for other, until in leases.items() if other != request}
        leases.clear()
        leases[request] = 0.0  # in front: 0.26 looks no further than the first lease that stands
        leases.update(rest)
        return True
