"""Teachers: frozen models that read completions and have an opinion of every token."""

from opd.teachers.local import LocalOpinion, LocalTeacher
from opd.teachers.served import ServedTeacher, TeacherServer, is_served
from opd.teachers.teacher import Gives, Opened, Opinion, Teacher
from opd.teachers.teachers import DEFAULT, REFERENCE, TEACHER, Teachers, load_teachers

__all__ = [
    "DEFAULT",
    "REFERENCE",
    "TEACHER",
    "Gives",
    "LocalOpinion",
    "LocalTeacher",
    "Opened",
    "Opinion",
    "ServedTeacher",
    "Teacher",
    "TeacherServer",
    "Teachers",
    "is_served",
    "load_teachers",
]
