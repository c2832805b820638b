"""Longspan: attention, models and training for sequences longer than one device can hold."""
