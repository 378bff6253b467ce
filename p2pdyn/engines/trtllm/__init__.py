"""TensorRT-LLM as an engine: tensorrt_llm.LLM in the engine host's child.  docs/design/engine-trtllm.md.

Written to the API of TensorRT-LLM 1.2 and 1.3 and tested against a double of it; not run on hardware by us.  Nothing of
TensorRT-LLM is imported before :meth:`TrtllmEngine.load`, so that loading can tell of it.
"""

from p2pdyn.engines.trtllm.engine import TrtllmEngine, create

__all__ = ["TrtllmEngine", "create"]
