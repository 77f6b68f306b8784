"""`st_moe study`: tables and figures of the paper as grids of gin files."""
