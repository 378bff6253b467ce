"""SGLang as an engine: sglang.Engine in the engine host's child.  docs/design/engine-sglang.md says what maps to what.

Nothing of SGLang is imported before :meth:`SglangEngine.load`, so that loading can tell of it.
"""

from p2pdyn.engines.sglang.engine import SglangEngine, create

__all__ = ["SglangEngine", "create"]
