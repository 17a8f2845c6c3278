"""Tables of users in every format that is read: JSONL, CSV and its relatives, fastText, Parquet."""
