"""Ranks: process group and sharding, gradient reduction, watchdog, one error message for all ranks."""
