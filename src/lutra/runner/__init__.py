"""How a model flows through a method: streaming, statistics, progress, resume. No mathematics."""
