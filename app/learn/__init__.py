"""The Learn tab's data: recorded lessons, the numbers told about them, and model sizes.

Pure functions of files in assets/lessons and of the engine's public code: no model, no widget. The
tab's texts are in app/components/static/learn.html; nothing in them depends on a visitor.
"""

from .geometry import MODELS, ModelSize
from .lessons import Lesson, load_lessons
from .routes import lesson_routes

__all__ = ["MODELS", "Lesson", "ModelSize", "lesson_routes", "load_lessons"]
