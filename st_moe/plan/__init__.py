"""`st_moe plan`: does a run fit a machine that is not there, and how well."""
