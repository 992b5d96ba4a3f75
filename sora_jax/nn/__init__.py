"""Apply layers as functions of parameters."""
