"""The database refuses every change of a job's state but the transitions: the trigger refused only to leave an end."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# As `tasks.records.states.trigger` made them from the table of transitions when this was written.
_FUNCTION = """
    CREATE FUNCTION refuse_transition() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state <> OLD.state AND NOT (CASE OLD.state
            WHEN 'scheduled' THEN
                NEW.state IN ('queued', 'reserved', 'running', 'succeeded', 'failed', 'cancelled', 'expired')
            WHEN 'queued' THEN
                NEW.state IN ('reserved', 'running', 'succeeded', 'failed', 'cancelled', 'expired')
            WHEN 'reserved' THEN
                NEW.state IN ('queued', 'running', 'retrying', 'succeeded', 'failed', 'cancelled', 'expired')
            WHEN 'running' THEN
                NEW.state IN ('queued', 'retrying', 'succeeded', 'failed', 'cancelled', 'expired')
            WHEN 'retrying' THEN
                NEW.state IN ('queued', 'reserved', 'running', 'succeeded', 'failed', 'cancelled', 'expired')
            ELSE false END) THEN
            RAISE EXCEPTION 'job % is %, and cannot become %', OLD.id, OLD.state, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
"""

_TRIGGER = """
    CREATE TRIGGER refuse_transition BEFORE UPDATE OF state ON jobs FOR EACH ROW
    WHEN (OLD.state IN ('succeeded', 'failed', 'cancelled', 'expired')
        OR NEW.state NOT IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired'))
    EXECUTE FUNCTION refuse_transition()
"""

_BEFORE = (
    """
    CREATE FUNCTION keep_terminal_state() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state IS DISTINCT FROM OLD.state THEN
            RAISE EXCEPTION 'job % has ended as %, and cannot become %', OLD.id, OLD.state, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER keep_terminal_state BEFORE UPDATE OF state ON jobs FOR EACH ROW
    WHEN (OLD.state IN ('succeeded', 'failed', 'cancelled', 'expired')) EXECUTE FUNCTION keep_terminal_state()
    """,
)


def upgrade() -> None:
    op.execute("DROP TRIGGER keep_terminal_state ON jobs")
    op.execute("DROP FUNCTION keep_terminal_state()")
    op.execute(_FUNCTION)
    op.execute(_TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER refuse_transition ON jobs")
    op.execute("DROP FUNCTION refuse_transition()")
    for statement in _BEFORE:
        op.execute(statement)
