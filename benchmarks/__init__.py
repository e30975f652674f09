"""Figures for the README: what is compared runs in one process, on data that calibration did not see."""
