from tests.release.conftest import adapter, base, rows

__all__ = ["adapter", "base", "rows"]
