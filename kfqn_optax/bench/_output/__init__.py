"""What every command of the bench shows and writes: tables, figures, progress, JSON."""
