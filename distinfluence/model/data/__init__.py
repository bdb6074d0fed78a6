"""The one door for data: whatever users bring becomes `Samples`, or is refused with what to do."""
