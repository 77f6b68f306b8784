"""`st_moe trace`: which tokens go to which expert (paper section 7)."""
