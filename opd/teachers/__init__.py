"""Teachers: frozen models that read completions and have an opinion of every token."""

from opd.teachers.local import LocalOpinion, LocalTeacher
from opd.teachers.teacher import Gives, Opened, Opinion, Teacher
from opd.teachers.teachers import DEFAULT, TEACHER, Teachers, load_teachers

__all__ = [
    "DEFAULT",
    "TEACHER",
    "Gives",
    "LocalOpinion",
    "LocalTeacher",
    "Opened",
    "Opinion",
    "Teacher",
    "Teachers",
    "load_teachers",
]
