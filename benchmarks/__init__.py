"""How fast mmkern is on this machine, and whether it is right: cases, measuring, reports."""
