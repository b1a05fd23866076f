"""Weights from files into models and back."""
