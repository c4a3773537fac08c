"""From raw files to curated documents: sources, extraction, filters, deduplication, split."""
