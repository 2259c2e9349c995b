"""How blocks are scored and chosen."""
