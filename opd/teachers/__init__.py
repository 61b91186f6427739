"""Teachers: frozen models that score completions."""

from opd.teachers.local import LocalTeacher, TeacherScored

__all__ = ["LocalTeacher", "TeacherScored"]
