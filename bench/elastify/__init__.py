"""The miniature: elastic training measured from start to end."""
