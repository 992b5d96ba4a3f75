"""The only room that knows the axes of the mesh."""
