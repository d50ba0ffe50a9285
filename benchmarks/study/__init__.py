"""The quality benchmark in parts: texts, methods, cells of the tables, how one is measured, and how results are shown."""
