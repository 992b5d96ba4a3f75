"""Lay out arrays over devices: no other subpackage names the axes of the mesh."""
