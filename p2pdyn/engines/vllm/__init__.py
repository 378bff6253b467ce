"""vLLM as an engine: AsyncLLM in the engine host's child.  docs/design/engine-vllm.md says what is mapped to what.

Nothing of vLLM is imported before :meth:`VllmEngine.load`, so that loading can tell of it.
"""

from p2pdyn.engines.vllm.engine import VllmEngine, create

__all__ = ["VllmEngine", "create"]
