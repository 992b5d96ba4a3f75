"""Weights of others to our trees and back, tensor by tensor: nothing is skipped in silence."""
