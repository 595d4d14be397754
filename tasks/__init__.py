"""What a job is: records, store, submitting, the life of a job."""
