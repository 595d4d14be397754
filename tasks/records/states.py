"""The states of jobs as SQL: the guards of statements, and the trigger that refuses every change but the transitions.

Both are made from `device_operations.jobs.TRANSITIONS`. A migration holds the trigger as it was made from the table of
its time: a change of the table needs a migration with `trigger()` as it is then, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection

from device_operations.jobs import FOLLOWING, OPEN, State

#: The name of the trigger on `jobs`, and of its function.
TRIGGER = "refuse_transition"


def listed(states: Collection[State]) -> str:
    """States as SQL, for `state IN …`: `('queued', 'running')`, in the order of the enum."""
    return "(" + ", ".join(f"'{state}'" for state in State if state in states) + ")"


def trigger() -> tuple[str, str]:
    """The statements that make the function and its trigger.

    The function decides. The trigger's `WHEN` only keeps it from being called where every open state may change to the
    new one, as to `running` and to an end. PostgreSQL parses a `WHEN` anew for each statement: with the whole table in
    it, an UPDATE of one job took twice the CPU time.
    """
    ends = [state for state in State if not FOLLOWING[state]]
    free = [state for state in State if all(state in FOLLOWING[before] | {before} for before in OPEN)]
    cases = [
        f"WHEN '{state}' THEN\n                NEW.state IN {listed(after)}"
        for state, after in FOLLOWING.items()
        if after
    ]
    allowed = "\n            ".join(cases)
    return (
        f"""
    CREATE FUNCTION {TRIGGER}() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state <> OLD.state AND NOT (CASE OLD.state
            {allowed}
            ELSE false END) THEN
            RAISE EXCEPTION 'job % is %, and cannot become %', OLD.id, OLD.state, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
""",
        f"""
    CREATE TRIGGER {TRIGGER} BEFORE UPDATE OF state ON jobs FOR EACH ROW
    WHEN (OLD.state IN {listed(ends)}
        OR NEW.state NOT IN {listed(free)})
    EXECUTE FUNCTION {TRIGGER}()
""",
    )
