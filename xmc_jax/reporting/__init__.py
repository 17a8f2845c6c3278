"""What a finished run was like, as one page to look at: report.html."""
