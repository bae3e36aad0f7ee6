"""Models: spec strings, networks opened with their weights, teachers, students, exports."""
