"""Faults, really injected: processes killed and frozen, servers stopped, disks filled, clocks moved."""
