"""Constants of a device from times measured on it: a table, the terms of its rows, a fit, a preset file."""
