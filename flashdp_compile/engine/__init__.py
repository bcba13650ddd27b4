"""What turns private steps into a private run: a budget, noise once for each logical batch, and what resumes it."""

from flashdp_compile.engine.privacy_engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
