"""Settings of all tests: hypothesis sets no deadline, because the first call of a kind imports, caches or compiles."""

from hypothesis import settings

settings.register_profile("functional_lm", deadline=None)
settings.load_profile("functional_lm")
